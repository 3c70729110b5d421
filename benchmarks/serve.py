"""Tokens per second over HTTP, against `transformers serve` and llama.cpp's server.

The same weights, the same prompts, greedy, all servers alive at once and asked in turns; every
ratio is between turns that followed each other. A turn is so many clients at once, each of which
sends its requests one after the other and waits for the whole answer; rates count the tokens of
answers, prompts are inside the time. `per cpu s` are tokens per second of processor time of all
the server's processes, which does not count what others took. With one client, streams tell when
the first token comes. The client shares the cores.

    python benchmarks/serve.py [--sizes 10m,90m] [--clients 1,8,32] [--precisions fp32,int8]
                               [--kinds ours,llama.cpp,transformers,batching] [--rounds 3]

`transformers serve` has no lower precision on a CPU and takes part in fp32 only. Each size and
precision is a group of its own with servers of its own, so that a long run can be cut into several.
llama.cpp takes part where `xllamacpp` and `gguf` can be imported (see requirements.txt); PEERS may
name a folder that holds them.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
from models import write, write_gguf
from servers import Server, Setting

KINDS = ("ours", "llama.cpp", "transformers", "batching")
PROMPT = 32
NEW = {"10m": 64, "90m": 32}
EACH = {1: 6, 8: 2, 32: 1}
"""Requests of each client in a turn."""
STREAMS = 5
Key = tuple[str, str]
"""(what was measured, of which server)."""


def prompts_of(folder: Path, rng: random.Random) -> Any:
    """Endless prompts of exactly 32 tokens, cut from the standard library's sources."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    while True:
        text = rng.choice(files).read_text("utf-8", errors="replace")
        at = rng.randrange(max(1, len(text) - 2000))
        ids = tokenizer(text[at : at + 2000])["input_ids"][:PROMPT]
        prompt = tokenizer.decode(ids)
        if len(ids) == PROMPT and tokenizer(prompt)["input_ids"] == ids:
            yield prompt


async def wave(server: Server, prompts: Sequence[Sequence[str]], new: int) -> float:
    """Seconds until every client has all its answers."""
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, trust_env=False
    ) as session:

        async def client(mine: Sequence[str]) -> None:
            for prompt in mine:
                body = server.body(prompt, new)
                async with session.post(f"{server.url}/v1/completions", json=body) as answer:
                    told = await answer.json()
                usage = told.get("usage") or told
                assert usage["completion_tokens"] == new, (server.name, told)
                assert usage["prompt_tokens"] == PROMPT, (server.name, told)

        began = time.perf_counter()
        await asyncio.gather(*(client(mine) for mine in prompts))
        return time.perf_counter() - began


async def first_token(server: Server, prompt: str, new: int) -> float:
    """Seconds until a stream says something of the answer."""
    body = server.body(prompt, new) | {"stream": True}
    began, first = time.perf_counter(), 0.0
    async with (
        aiohttp.ClientSession(trust_env=False) as session,
        session.post(f"{server.url}/v1/completions", json=body) as answer,
    ):
        async for line in answer.content:
            if not first and line.startswith(b"data:") and b'"text"' in line:
                first = time.perf_counter() - began
    assert first, server.name
    return first


class Turns:
    """One group: servers of one size and precision, and what they were seen to do."""

    def __init__(self, servers: Sequence[Server], prompts: Any, new: int) -> None:
        self._servers, self._prompts, self._new = servers, prompts, new
        self.seen: dict[Key, list[float]] = {}

    def _note(self, what: str, server: Server, value: float) -> None:
        self.seen.setdefault((what, server.name), []).append(value)
        print(f"{what:<16} {server.name:<13} {value:10.2f}", flush=True)

    def warm(self) -> None:
        """The first request of each server, and the ones that follow it."""
        for server in self._servers:
            server.resume()
            cold, *warm = (
                asyncio.run(wave(server, [[next(self._prompts)]], self._new)) for _ in range(4)
            )
            self._note("first request +s", server, cold - statistics.median(warm))
            server.pause()

    def round(self, number: int, clients: Sequence[int]) -> None:
        for count in clients:
            asked = [[next(self._prompts) for _ in range(EACH[count])] for _ in range(count)]
            turn = number % len(self._servers)
            for server in [*self._servers[turn:], *self._servers[:turn]]:
                server.resume()
                before, tokens = server.cpu_seconds(), count * EACH[count] * self._new
                seconds = asyncio.run(wave(server, asked, self._new))
                self._note(f"{count}", server, tokens / seconds)
                spent = server.cpu_seconds() - before
                self._note(f"{count} per cpu s", server, tokens / max(spent, 0.01))
                if count == 1:
                    for mine in asked[0][:STREAMS]:
                        # Another beginning, so that no cache has it.
                        first = asyncio.run(first_token(server, f"#{mine}", 8))
                        self._note("first token ms", server, 1e3 * first)
                server.pause()


def idle_share(seconds: float = 5.0) -> float:
    """Of one core, that everything on this machine takes while nobody asks."""
    import psutil

    return float(psutil.cpu_percent(seconds)) / 100 * (os.cpu_count() or 1)


def measure(
    size: str, precision: str, kinds: Sequence[str], clients: Sequence[int], asked: Any
) -> dict[str, float]:
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hb-", dir="/tmp")))
        folder = root / "model"
        write(folder, size)
        if "llama.cpp" in kinds:
            write_gguf(folder, folder / f"{precision}.gguf", precision)
        setting = Setting(folder, precision, asked.threads, root)
        servers = []
        for kind in kinds:
            server = Server(kind, setting, free_port(), root / f"{kind}.log")
            servers.append(server)
            stack.callback(server.end)
            print(f"{size} {precision} {kind}: up in {server.ready_seconds:.1f} s", flush=True)
            server.pause()
        turns = Turns(servers, prompts_of(folder, random.Random(asked.seed)), NEW[size])
        turns.warm()
        idle = idle_share()
        for number in range(asked.rounds):
            turns.round(number, clients)
    found = figures(turns.seen, f"{size}/{precision}")
    return found | {f"{size}/{precision}/idle share of a core": round(idle, 3)}


def figures(seen: dict[Key, list[float]], group: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for (what, name), values in seen.items():
        found[f"{group}/{what}/{name}"] = round(statistics.median(values), 2)
        if name == "ours" or what.startswith("first"):
            continue
        pairs = zip(seen[what, "ours"], values, strict=True)
        ratio = statistics.median(one / other for one, other in pairs)
        found[f"{group}/{what}/ours over {name}"] = round(ratio, 3)
    for key in sorted(found):
        print(f"{key:<52} {found[key]:>10}")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="10m,90m")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--precisions", default="fp32,int8")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="another one, other prompts")
    asked = parser.parse_args()
    # The servers must end with us, also where a time limit ends us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.path += filter(None, [os.environ.get("PEERS")])
    found: dict[str, float] = {}
    clients = [int(count) for count in asked.clients.split(",")]
    for size in asked.sizes.split(","):
        for precision in asked.precisions.split(","):
            lower = () if precision == "fp32" else ("transformers", "batching")
            kinds = [kind for kind in asked.kinds.split(",") if kind not in lower]
            found |= measure(size, precision, kinds, clients, asked)
    print(json.dumps({"figures": found}))


if __name__ == "__main__":
    main()
