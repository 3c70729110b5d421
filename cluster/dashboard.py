"""The REST side of a running cluster: Ray's dashboard, asked from a laptop through a tunnel."""

import json
import os
import urllib.error
import urllib.request
from typing import Any

from cluster.errors import ClusterError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
SECONDS = 20.0


def address_of(given: str | None) -> str:
    """The dashboard's address: as given, as Ray's own clients take it, or the tunnel's usual end.

    `$RAY_ADDRESS` counts where it is one of HTTP; it may be that of a cluster to join, too.
    """
    joined = os.environ.get("RAY_ADDRESS", "")
    found = given or os.environ.get("RAY_API_SERVER_ADDRESS")
    found = found or (joined if joined.startswith("http") else DEFAULT_ADDRESS)
    return (found if "://" in found else f"http://{found}").rstrip("/")


class Dashboard:
    """
    Args:
        address: `http://host:port`.
        token: Ray's; None asks as a stranger.
    """

    def __init__(self, address: str, token: str | None) -> None:
        self.address, self._token = address, token

    def get(self, path: str) -> Any:
        """What a path answers, read as JSON.

        Raises:
            ClusterError: if nobody answers, or the answer is none.
        """
        status, body = self._ask(path)
        if status in (401, 403):
            raise ClusterError(
                f"{self.address} answers {status} to the token that is here: it is not the "
                "cluster's; copy that one to ~/.ray/auth_token (mode 0600)"
            )
        if status != 200:
            raise ClusterError(f"{self.address}{path} answered {status}: {_text(body)}")
        try:
            return json.loads(body)
        except ValueError:
            raise ClusterError(
                f"{self.address}{path} answers no JSON: is this Ray's dashboard?"
            ) from None

    def status(self, path: str) -> int:
        """The HTTP status that a path answers with."""
        return self._ask(path)[0]

    def _ask(self, path: str) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        request = urllib.request.Request(self.address + path, headers=headers)
        # No proxy that the environment names: the token is for the cluster alone.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=SECONDS) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ClusterError(
                f"no Ray dashboard answers at {self.address} ({reason}): open the tunnel with "
                "`ray dashboard FILE.yaml`, or name it with --address"
            ) from None


def _text(body: bytes) -> str:
    return " ".join(body.decode(errors="replace").split())[:300]
