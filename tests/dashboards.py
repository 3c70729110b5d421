"""A stand-in for Ray's dashboard: a real HTTP server with canned answers and a token."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@contextmanager
def dashboard(answers: Mapping[str, Any], token: str | None) -> Iterator[str]:
    """Its address. Paths answer without their query; a token of None asks nobody for one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            given = self.headers.get("Authorization")
            if token is not None and given is None:
                self._send(401, {"error": "no token"})
            elif token is not None and given != f"Bearer {token}":
                self._send(403, {"error": "another token"})
            elif path in answers:
                self._send(200, answers[path])
            else:
                self._send(404, {"error": path})

        def _send(self, status: int, tree: Any) -> None:
            body = json.dumps(tree).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
