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
mount --bind "$own/resolv.conf" /etc/resolv.conf
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


def missing() -> str:
    """Why no hosts can be made here, with the cure; empty where they can."""
    if os.geteuid() != 0:
        return "hosts are made of namespaces, which takes root"
    if lacking := [name for name in NEEDED if shutil.which(name, path=SEARCH) is None]:
        packages = " ".join(NEEDED[name] for name in lacking)
        return f"no {', '.join(lacking)} on this machine: apt-get install {packages}"
    probe = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"this machine makes no namespaces: {tried.stderr.strip()}"
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

    def ssh(self, host: Host, command: str, timeout: float = 60) -> str:
        """What a command on a host prints; AssertionError where it fails."""
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
        call = ["ssh", "-i", str(self.key), *(f"-o{option}" for option in options)]
        call += [f"root@{host.address}", command]
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
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix="hl-", dir="/tmp"))
    made = Lab(folder, _free_subnet())
    try:
        _lay_bridge(made)
        for number in range(1, count + 1):
            made.hosts.append(_start(made, number, count, pinned=pinned))
        for host in made.hosts:
            _wait_for_ssh(made, host)
        yield made
    finally:
        _tear_down(made)


def _lay_bridge(lab: Lab) -> None:
    (lab.folder / "pid").write_text(str(os.getpid()))
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


def _tear_down(lab: Lab) -> None:
    for host in lab.hosts:
        # The namespace's first process goes, and with it all others of the host.
        with suppress(ProcessLookupError):
            os.killpg(host.init.pid, signal.SIGKILL)
        host.init.wait()
    lab._log.close()
    _remove(lab.tag)
    shutil.rmtree(lab.folder, ignore_errors=True)


def _sweep() -> None:
    """Take away what a test that was killed left behind."""
    for folder in Path("/tmp").glob("hl-*"):
        mark = folder / "pid"
        if mark.exists() and not Path(f"/proc/{mark.read_text()}").exists():
            _remove(folder.name.removeprefix("hl-"))
            shutil.rmtree(folder, ignore_errors=True)


def _remove(tag: str) -> None:
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    for space in (line.split()[0] for line in spaces.stdout.splitlines()):
        if space.startswith(f"hl{tag}-"):
            for pid in _run("ip", "netns", "pids", space).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _run("ip", "netns", "delete", space)
    with suppress(subprocess.CalledProcessError):
        _run("ip", "link", "delete", f"hlb{tag}")


def _free_subnet() -> str:
    """The first three numbers of addresses that no route of this machine leads to; not always the
    same ones, because SSH connections to hosts that are gone linger for some seconds."""
    routes = _run("ip", "route")
    numbers = random.sample(range(1, 255), 254)
    return next(f for n in numbers if (f := f"10.213.{n}") + "." not in routes)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(
            done.returncode, shlex.join(command), done.stdout, done.stderr
        )
    return done.stdout
