"""The servers that `serve.py` compares, each a process group of its own on a port of its own.

    ours          `heliostat serve`: HAProxy, ingress, one replica with all threads
    llama.cpp     the server of llama.cpp (xllamacpp) over a GGUF file of the same weights
    transformers  `transformers serve`, which answers one request after the other
    batching      `transformers serve --continuous-batching`

While one answers, the others that can be are stopped (SIGSTOP), so that they take no part of the
cores; a Ray would take the pause for a failure and stays awake.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.storage import Store

HERE = Path(__file__).parent
MOST = 32
"""Requests at once."""
CONTEXT = 640
NAME = "bench"
READY_SECONDS = 180


@dataclass(frozen=True)
class Setting:
    """What all servers are given alike."""

    folder: Path
    """The published model."""
    precision: str
    threads: int
    root: Path
    """For files of their own."""
    overrides: tuple[str, ...] = ()
    """Of our configuration."""


@dataclass(frozen=True)
class Start:
    command: Sequence[str]
    model: str = NAME
    """How requests name it."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that only this server takes."""
    pausable: bool = True


def start_of(kind: str, setting: Setting, port: int) -> Start:
    if kind == "ours":
        return _ours(setting, port)
    if kind == "llama.cpp":
        file = setting.folder / f"{setting.precision}.gguf"
        command = [str(HERE / "servers.py"), str(file), str(port), str(setting.threads)]
        # Random weights come upon the end of text, and no answer may be shorter than asked for.
        return Start([sys.executable, *command], extra={"ignore_eos": True, "cache_prompt": False})
    own = ["--port", str(port), "--device", "cpu", "--dtype", "float32", "--log-level", "error"]
    if kind == "batching":
        # Without them it takes half a minute over its first request. Room for all that is asked.
        own += ["--continuous-batching", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "1024"]
    program = str(Path(sys.executable).with_name("transformers"))
    return Start([program, "serve", str(setting.folder), *own], model=str(setting.folder))


def _ours(setting: Setting, port: int) -> Start:
    root = setting.root / "store"
    staging = Store(str(root)).stage("model", NAME)
    # In a lower precision nothing to replay: random weights have near-ties, which it turns.
    prompts = recorded(setting.folder) if setting.precision == "fp32" else []
    detail = {"family": "causal_lm", "context_length": CONTEXT, "prompts": prompts}
    files = [p for p in setting.folder.iterdir() if p.suffix != ".gguf"]
    taken = setting.root / "published"
    taken.mkdir()
    for file in files:
        os.link(file, taken / file.name)
    staging.commit(staging.copy_tree(taken), fingerprint=NAME, config={}, detail=detail)
    overrides = [
        f"storage.root={root}", f"name={NAME}", f"serve.models=[{NAME}]", f"serve.port={port}",
        f"serve.threads_per_replica={setting.threads}", f"serve.max_concurrent={MOST}",
        f"serve.max_waiting={2 * MOST}", f"serve.engine.context={CONTEXT}",
        f"serve.engine.precision={setting.precision}", "serve.deadline_seconds=300",
        *setting.overrides,
    ]  # fmt: skip
    command = [sys.executable, "-m", "cluster.cli", "serve", "gpt-demo", *overrides]
    return Start(command, pausable=False)


def recorded(folder: Path) -> list[dict[str, Any]]:
    """What publishing writes down, for the replica to prove itself with."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipelines.publish import parity_prompts

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return parity_prompts(model, folder, ("def ", "import os\n", "你好"))


class Server:
    """A running server.

    Args:
        log: what it prints goes there.
    """

    def __init__(self, kind: str, setting: Setting, port: int, log: Path) -> None:
        self.name, self.url = kind, f"http://127.0.0.1:{port}"
        self.start = start_of(kind, setting, port)
        began = time.monotonic()
        with log.open("wb") as printed:
            self._process = subprocess.Popen(
                self.start.command,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                process_group=0,
                # What a shell starts in the background ignores it, and hands that down.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                env=_environment(kind, setting),
            )
        self._wait(log)
        self.ready_seconds = time.monotonic() - began

    def pause(self) -> None:
        if self.start.pausable:
            os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        if self.start.pausable:
            os.killpg(self._process.pid, signal.SIGCONT)

    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        asked = {"model": self.start.model, "prompt": prompt, "max_tokens": tokens}
        return {**asked, "temperature": 0, **self.start.extra}

    def cpu_seconds(self) -> float:
        """Processor time that the server has taken so far, all its processes together."""
        import psutil

        spent = 0.0
        leader = psutil.Process(self._process.pid)
        for process in [leader, *leader.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent += times.user + times.system
        return spent

    def end(self) -> None:
        self.resume()
        # As Ctrl-C does: our command then ends the Ray that it started.
        self._process.send_signal(signal.SIGINT)  # nothing where it has ended
        try:
            self._process.wait(60 if self.name == "ours" else 5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _wait(self, log: Path) -> None:
        """Until its model is loaded."""
        ends = time.monotonic() + READY_SECONDS
        while time.monotonic() < ends and self._process.poll() is None:
            if self._ready(log):
                return
            time.sleep(0.2)
        if self._process.poll() is None:
            self.end()
        tail = log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"{tail}\n{self.name} did not come up")

    def _ready(self, log: Path) -> bool:
        if self.name == "ours":
            return b"answers with" in log.read_bytes()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def _environment(kind: str, setting: Setting) -> dict[str, str]:
    paths = [str(HERE.parent)]
    if kind != "ours":
        paths += filter(None, [os.environ.get("PEERS")])
    # Short: Ray's unix sockets lie below it.
    folder = tempfile.mkdtemp(prefix="hb-", dir=setting.root)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(setting.threads),
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 64,
        "HF_HUB_OFFLINE": "1",
    }


def llama_cpp(file: str, port: str, threads: str) -> None:
    """Serve a GGUF file until the process ends."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.port = file, int(port)
    parameters.n_parallel, parameters.n_ctx = MOST, MOST * CONTEXT
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(threads)
    parameters.endpoint_metrics, parameters.verbosity = False, -1
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    llama_cpp(*sys.argv[1:])
