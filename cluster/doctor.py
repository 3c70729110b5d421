"""`heliostat doctor`: is a live cluster fit for a run, before money burns?

Joins the cluster as any stage does, so from a laptop: `heliostat submit doctor RECIPE`.
"""

import time

from cluster import findings, progress
from cluster.access import JOBS
from cluster.config import RunConfig
from cluster.dashboard import Dashboard
from cluster.errors import ClusterError
from cluster.examination import Nodes
from cluster.findings import Finding
from cluster.session import Session, open_store, session


def run(config: RunConfig) -> None:
    """Print a line per finding.

    Raises:
        ClusterError: if one of them must be cured before a run.
    """
    store = open_store(config)
    began = time.monotonic()
    with session(config) as joined:
        nodes = Nodes()
        examined = nodes.full(store.uri)
        found = findings.full(examined, nodes.reduce(), config.serve.port, closed(joined))
    for finding in found:
        progress.say(finding.line())
    bad = sum(finding.level == "bad" for finding in found)
    warnings = sum(finding.level == "warn" for finding in found)
    told = f"{len(examined)} node(s) examined in {time.monotonic() - began:.0f} s"
    if bad:
        raise ClusterError(f"{told}: {bad} finding(s) to cure first, {warnings} to think about")
    progress.say(f"{told}: fit for a run" + (f", {warnings} to think about" if warnings else ""))


def closed(joined: Session) -> Finding:
    """Whether the dashboard refuses who has no token."""
    if not joined.dashboard:
        return Finding("ok", "dashboard", "there is none")
    status = Dashboard(f"http://{joined.dashboard}", token=None).status(JOBS)
    if status == 401:
        return Finding("ok", "dashboard", "401 without the token")
    return Finding(
        "bad",
        "dashboard",
        f"{joined.dashboard} answers {status} to who has no token, not 401",
        "start every node with RAY_AUTH_MODE=token and one ~/.ray/auth_token",
    )


def before(joined: Session) -> None:
    """The quick part, on a cluster of several nodes: what would break a run in its middle.

    Raises:
        ClusterError: with the first thing to cure.
    """
    if len(joined.nodes) < 2:
        return
    found = findings.quick(Nodes().quick())
    for finding in found:
        if finding.level == "bad":
            raise ClusterError(f"{finding.subject}: {finding.text}; {finding.cure}")
