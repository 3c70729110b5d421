"""Several hosts on this one machine: network namespaces on a bridge, an sshd in each.

A host has its own address, process ids, home, /tmp, /run and /dev/shm, and one folder that all
share: the storage root at /mnt/heliostat. Of this machine it sees the operating system and the
Python packages, read-only, as if both were its image; neither the checkout nor anyone's files.
"""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.checkout import REPOSITORY

HOME = Path.home()
STORE = "/mnt/heliostat"
NEEDED = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "rsync": "rsync",
    "unshare": "util-linux",
}
"""Program -> Debian's package of it."""
SCRIPTS = {
    "pip": "pip._internal.cli.main:main",
    "ray": "ray.scripts.scripts:main",
    "serve": "ray.serve.scripts:cli",
    "mlflow": "mlflow.cli:cli",
}
"""Commands of a host's environment, as pip would have made them."""
SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

# What a new host runs first. "$1" its name, "$2" its private folder, "$3" the storage root, then
# the folders of this machine that hide behind private ones and are wanted back.
INIT = """
name=$1 own=$2 store=$3; shift 3
hostname "$name"
mount --make-rprivate /
mount --bind "$own/hosts" /etc/hosts
[ ! -e /etc/resolv.conf ] || mount --bind "$own/resolv.conf" /etc/resolv.conf
for pair in "$@"; do
    mkdir -p "$own${pair#*:}"
    mount --bind "${pair%%:*}" "$own${pair#*:}"
    mount -o remount,bind,ro "$own${pair#*:}"
done
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount -t tmpfs tmpfs /mnt && mkdir /mnt/heliostat
mount --bind "$store" /mnt/heliostat
mount --rbind "$own/home" "$HOME"
[ -z "$HIDE" ] || mount --rbind "$own/hidden" "$HIDE"
mount --rbind "$own/tmp" /tmp
exec $CORE $(command -v sshd) -D -e -f "$HOME/.sshd/config"
"""


@cache
def missing() -> str:
    """Why no hosts can be made here, with the cure; empty where they can, which is tried: there are
    many ways to refuse namespaces, bridges or mounts.
    """
    if os.geteuid() != 0:
        return "hosts are made of namespaces, which takes root"
    if lacking := [name for name in NEEDED if shutil.which(name, path=SEARCH) is None]:
        packages = " ".join(NEEDED[name] for name in lacking)
        return f"no {', '.join(lacking)} on this machine: apt-get install {packages}"
    try:
        with lab(2) as tried:
            one, other = tried.hosts
            # A firewall of this machine's may stand between the two, on their own bridge.
            tried.ssh(one, f"timeout 5 bash -c ': < /dev/tcp/{other.address}/22'")
            tried.ssh(one, "~/heliostat-venv/bin/python -c 'import ray'")
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        told = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        reason = " ".join((told or str(error)).split())
        return f"two hosts were tried and could not be made here: {reason[-400:]}"
    return ""


@dataclass(frozen=True)
class Host:
    """A running host."""

    name: str
    address: str
    space: str
    """Its network namespace."""
    link: str
    """Its cable's end at the bridge."""
    init: subprocess.Popen[bytes]
    home: Path
    """As this machine sees it."""


class Lab:
    """Hosts, the laptop's own folders, and a key that opens the hosts. Use through `lab`."""

    def __init__(self, folder: Path, subnet: str) -> None:
        self.folder, self.subnet = folder, subnet
        self.tag = folder.name.removeprefix("hl-")
        self.store, self.laptop, self.key = folder / "store", folder / "laptop", folder / "key"
        self.hosts: list[Host] = []
        self._log = (folder / "sshd.log").open("ab")

    @property
    def bridge(self) -> str:
        return f"hlb{self.tag}"

    def environment(self, **more: str) -> dict[str, str]:
        """Of a command on the laptop: its own home, and nothing of this process' Ray."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST"))}
        kept["PATH"] = f"{Path(sys.executable).parent}:{SEARCH}"
        return kept | {"HOME": str(self.laptop), "RAY_TMPDIR": str(self.laptop)} | more

    def ssh_command(self) -> list[str]:
        """Without what this machine's user has set up for other hosts."""
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
        options += ["IdentitiesOnly=yes", "BatchMode=yes", "ConnectTimeout=10"]
        return ["ssh", "-F/dev/null", f"-i{self.key}", *(f"-o{option}" for option in options)]

    def ssh(self, host: Host, command: str, timeout: float = 60) -> str:
        """What a command on a host prints; AssertionError where it fails."""
        call = [*self.ssh_command(), f"root@{host.address}", command]
        done = subprocess.run(call, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"{host.name}: {command}: {done.stdout}{done.stderr}"
        return done.stdout

    def processes(self, host: Host, word: str) -> list[int]:
        """Pids, as this machine counts them, of a host's processes with a word in their command."""
        found = []
        for pid in map(int, _run("ip", "netns", "pids", host.space).split()):
            with suppress(FileNotFoundError, ProcessLookupError):
                if word in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "):
                    found.append(pid)
        return found

    def kill(self, host: Host, *words: str) -> None:
        """kill -9 of such processes."""
        for word in words:
            for pid in self.processes(host, word):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End all that runs on the hosts."""
        for host in self.hosts:
            # The namespace's first process goes, and with it all others of the host.
            with suppress(ProcessLookupError):
                os.killpg(host.init.pid, signal.SIGKILL)
            host.init.wait()
        self._log.close()

    def cut(self, host: Host) -> None:
        """Pull a host's cable."""
        _run("ip", "link", "set", host.link, "down")

    def mend(self, host: Host) -> None:
        _run("ip", "link", "set", host.link, "up")


@contextmanager
def lab(count: int, *, pinned: bool = False) -> Iterator[Lab]:
    """Some hosts that answer SSH; all is gone at the end.

    Args:
        pinned: each has a CPU core of its own, as far as there are as many.
    """
    with _kept() as folder:
        made = Lab(folder, _free_subnet())
        try:
            _lay_bridge(made)
            for number in range(1, count + 1):
                made.hosts.append(_start(made, number, count, pinned=pinned))
            for host in made.hosts:
                _wait_for_ssh(made, host)
            yield made
        finally:
            made.close()


@contextmanager
def _kept() -> Iterator[Path]:
    """A folder, and a process that takes the lab in it away when this one ends, however it does."""
    folder = Path(tempfile.mkdtemp(prefix="hl-", dir="/tmp"))
    keeper = subprocess.Popen(
        [sys.executable, "-m", "tests.lab", str(folder)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield folder
    finally:
        keeper.communicate()


def _lay_bridge(lab: Lab) -> None:
    lab.store.mkdir()
    lab.laptop.mkdir(mode=0o700)
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(lab.key))
    _run("ip", "link", "add", lab.bridge, "type", "bridge")
    _run("ip", "address", "add", f"{lab.subnet}.254/24", "dev", lab.bridge)
    _run("ip", "link", "set", lab.bridge, "up")


def _start(lab: Lab, number: int, count: int, *, pinned: bool) -> Host:
    name, address = f"host{number}", f"{lab.subnet}.{number}"
    space, link = f"hl{lab.tag}-{number}", f"hlv{lab.tag}{number}"
    _run("ip", "netns", "add", space)
    _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
    _run("ip", "link", "set", link, "master", lab.bridge, "up")
    inside = ("ip", "-n", space)
    _run(*inside, "address", "add", f"{address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _run(*inside, "link", "set", device, "up")
    own = lab.folder / name
    _furnish(lab, own, address, count)
    core = f"taskset --cpu-list {(number - 1) % (os.cpu_count() or 1)}" if pinned else ""
    environment = {"HOME": str(HOME), "PATH": SEARCH, "HIDE": _hidden(), "CORE": core}
    command = ["ip", "netns", "exec", space, "unshare", "--mount", "--pid", "--uts", "--ipc"]
    command += ["--fork", "--kill-child", "--mount-proc", "sh", "-euc", INIT, "init"]
    init = subprocess.Popen(
        [*command, name, str(own), str(lab.store), *_image()],
        env=environment,
        stdout=lab._log,
        stderr=lab._log,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    return Host(name, address, space, link, init, own / "home")


def _furnish(lab: Lab, own: Path, address: str, count: int) -> None:
    """A host's private folders: a home with a way in and a Python environment to install into."""
    for folder in ("home/.sshd", "home/.ssh", "tmp", "hidden"):
        (own / folder).mkdir(parents=True, mode=0o700)
    (own / "tmp").chmod(0o1777)
    names = [f"{lab.subnet}.{number} host{number}" for number in range(1, count + 1)]
    (own / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
    (own / "resolv.conf").touch()
    shutil.copy(f"{lab.key}.pub", own / "home/.ssh/authorized_keys")
    (own / "home/.bashrc").write_text(f"export PATH={sys.base_prefix}/bin:$PATH\n")
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(own / "home/.sshd/key"))
    (own / "home/.sshd/config").write_text(
        f"ListenAddress {address}\nHostKey {HOME}/.sshd/key\nPermitRootLogin prohibit-password\n"
        f"StrictModes no\nPasswordAuthentication no\nPidFile none\nMaxStartups 100\n"
        f"Subsystem sftp internal-sftp\n"
    )
    _environment(own / "home/heliostat-venv")


def _environment(target: Path) -> None:
    """The environment that set-up installs into, with every package but Heliostat in it already,
    as an image of a cloud has them: a host here reaches no index."""
    base = getattr(sys, "_base_executable", sys.executable)
    _run(base, "-m", "venv", "--without-pip", str(target))
    packages = target / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    # A line of a path file; path files in that folder itself, our checkout's, are not read.
    (packages / "image.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    python = f"{HOME}/heliostat-venv/bin/python"
    for name, where in SCRIPTS.items():
        module, _, function = where.partition(":")
        script = target / "bin" / name
        script.write_text(
            f"#!{python}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        )
        script.chmod(0o755)


def _hidden() -> str:
    """The checkout, where it is not hidden behind the private home or /tmp already."""
    return "" if _behind(REPOSITORY) else str(REPOSITORY)


def _behind(path: Path) -> str:
    """The private folder that a path of this machine disappears behind, if any."""
    for folder, place in ((HOME, "home"), (Path("/tmp"), "tmp"), (REPOSITORY, "hidden")):
        if path.is_relative_to(folder):
            return f"/{place}/{path.relative_to(folder)}"
    return ""


def _image() -> list[str]:
    """`folder:place in the private folders` of the interpreter and the packages."""
    wanted = (Path(sys.base_prefix), Path(sysconfig.get_path("purelib")))
    return [f"{path}:{place}" for path in wanted if (place := _behind(path))]


def _wait_for_ssh(lab: Lab, host: Host) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            lab.ssh(host, "true")
            return
        except AssertionError as error:
            log = (lab.folder / "sshd.log").read_text()
            if host.init.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{host.name} does not answer: {error}\n{log}") from None
            time.sleep(0.2)


def remains(folder: Path) -> list[str]:
    """Names of what there is of a lab on this machine."""
    tag = folder.name.removeprefix("hl-")
    names = _run("ip", "netns", "list").split() + _run("ip", "-brief", "link").split()
    found = [name for name in names if name.startswith((f"hl{tag}-", f"hlb{tag}"))]
    return found + [str(folder)] * folder.exists()


def _clear(folder: Path) -> None:
    """Take a lab away, however far it had come."""
    for name in remains(folder):
        if name.startswith("/"):
            continue
        if "-" not in name:
            _run("ip", "link", "delete", name)
            continue
        deadline = time.monotonic() + 10
        while (pids := _run("ip", "netns", "pids", name).split()) and time.monotonic() < deadline:
            for pid in map(int, pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        _run("ip", "netns", "delete", name)
    shutil.rmtree(folder, ignore_errors=True)


def _free_subnet() -> str:
    """The first three numbers of addresses that no route of this machine leads to; not always the
    same ones, because SSH connections to hosts that are gone linger for some seconds."""
    routes = _run("ip", "route")
    numbers = random.sample(range(1, 255), 254)
    return next(f for n in numbers if (f := f"10.213.{n}") + "." not in routes)


def _run(*command: str) -> str:
    environment = os.environ | {"PATH": SEARCH}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(
            done.returncode, shlex.join(command), done.stdout, done.stderr
        )
    return done.stdout


if __name__ == "__main__":
    # Ends when whoever holds the other end closes it, or is gone, even by kill -9.
    sys.stdin.read()
    _clear(Path(sys.argv[1]))
