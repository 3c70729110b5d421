"""Servers that break off, fail or fall silent: told as files that cannot be read, never silent."""

import gzip
import http.server
import io
import random
import re
import threading
from collections.abc import Callable, Iterator

import aiohttp
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import sources
from pipelines.data.sources import RawText, Reject, SourceFile, opening

NOISE = "".join(map(chr, random.Random(0).choices(range(0x4E00, 0x8E00), k=200_000)))
LINES = [NOISE[n : n + 50] for n in range(0, len(NOISE), 50)]
JSONL = "".join(f'{{"text": "{line}"}}\n' for line in LINES).encode()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": LINES}), sink)
    return sink.getvalue()


BODIES = {
    "a.txt": NOISE.encode(),
    "a.jsonl": JSONL,
    "a.csv": "\n".join(["text", *LINES, ""]).encode(),
    "a.jsonl.gz": gzip.compress(JSONL),
    "a.parquet": parquet(),
}
"""Each over half a megabyte: it comes in many pieces."""
Asked = http.server.BaseHTTPRequestHandler
Answer = Callable[[Asked, bytes], None]


def whole(asked: Asked, body: bytes) -> None:
    beginning(asked, body, len(body))


def beginning(asked: Asked, body: bytes, sent: int) -> None:
    asked.send_response(200)
    asked.send_header("Content-Length", str(len(body)))
    asked.end_headers()
    asked.wfile.write(body[:sent])
    asked.wfile.flush()


def broken_off(asked: Asked, body: bytes) -> None:
    beginning(asked, body, len(body) // 2)


def without_length(asked: Asked, body: bytes) -> None:
    """As in HTTP/1.0: the file ends where the connection does."""
    asked.send_response(200)
    asked.end_headers()
    asked.wfile.write(body[: len(body) // 2])


def failing(asked: Asked, body: bytes) -> None:
    asked.send_error(500, body[:20].hex())


def silent(asked: Asked, body: bytes) -> None:
    beginning(asked, body, len(body) // 2)
    threading.Event().wait(2)


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Starts a server that answers in one way; gives its address."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(Asked):
            def do_GET(self) -> None:
                answer(self, BODIES[self.path.lstrip("/")])

            def log_message(self, *args: object) -> None:
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def read(address: str, name: str) -> list[object]:
    """A file as it was listed when all was well."""
    url = f"{address}/{name}"
    file = SourceFile(url, url, url, len(BODIES[name]), 1, name)
    return list(sources.read_texts(file, 1 << 20))


@pytest.mark.parametrize("name", BODIES)
def test_a_large_file_comes_whole(serve: Callable[[Answer], str], name: str) -> None:
    items = read(serve(whole), name)
    texts = [item.text for item in items if isinstance(item, RawText)]
    assert texts == ([NOISE] if name == "a.txt" else LINES) and len(items) == len(texts)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (broken_off, "the connection broke"),
        (without_length, "the server sent [0-9]+ of [0-9]+ bytes"),
        (failing, "the server answers 500"),
    ],
)
def test_what_does_not_come_whole_is_quarantined(
    serve: Callable[[Answer], str], answer: Answer, reason: str, name: str
) -> None:
    *before, last = read(serve(answer), name)
    assert isinstance(last, Reject) and last.row is None
    assert re.search(reason, last.reason), last.reason
    # Of a connection that broke, aiohttp forgets what came and was not yet asked for.
    assert len(before) > 100 or name in ("a.txt", "a.parquet") or answer is not without_length


def test_a_server_that_falls_silent_is_given_up(
    serve: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = aiohttp.ClientTimeout(sock_read=0.2)
    hasty = fsspec.filesystem("http", client_kwargs={"timeout": patience})
    monkeypatch.setattr(opening, "http_filesystem", lambda: hasty)
    *_, last = read(serve(silent), "a.jsonl")
    assert isinstance(last, Reject) and "the server was silent" in last.reason


def test_an_answer_may_take_longer_than_five_minutes() -> None:
    patience = opening.http_filesystem().client_kwargs["timeout"]
    assert patience.total is None and patience.sock_read == opening.SILENCE
