"""Ports for services that a test starts."""

import random
import socket

FIRST, LAST = 20_000, 32_000
"""Above the ports that Ray gives its workers (10002 to 19999), which it refuses to share, and below
those that Linux gives to outgoing connections, which could take one before it is opened."""


def free_ports(count: int) -> list[int]:
    """Different ports of 127.0.0.1 that nothing listens on."""
    found: list[int] = []
    for port in random.sample(range(FIRST, LAST), LAST - FIRST):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports between {FIRST} and {LAST}")


def free_port() -> int:
    return free_ports(1)[0]
