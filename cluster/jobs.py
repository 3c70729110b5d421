"""A stage as a Ray job, submitted from a laptop: its name, its command, its log, its end.

Ray's own job API does the work. The job runs on the head from a copy of the working directory;
what it makes goes to `storage.root`.
"""

import asyncio
import os
import re
import secrets
import shlex
import time
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import loading, progress
from cluster.access import read_token
from cluster.chain import between
from cluster.config import RunConfig
from cluster.errors import ClusterError, UsageError
from cluster.panels import TRAINING
from cluster.spending import Held, dollars
from cluster.stages import BY_VERB
from cluster.upload import Upload, measure

RECONNECT_SECONDS = 2.0
PATIENCE = 30
"""Times in a row that a log may break off before following it is given up."""
PRICE = "price"
"""Of a device, among what a job's metadata tells."""
GRAFANA = "http://localhost:3000"
"""At the end of a tunnel; else where Ray's dashboard, too, has the browser look for it."""
GRAFANA_VARIABLE = "RAY_GRAFANA_IFRAME_HOST"
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Order:
    """A job to submit."""

    name: str
    command: str
    upload: Upload
    metadata: dict[str, str]


@dataclass(frozen=True)
class Wish:
    """What somebody typed."""

    verb: str
    recipe: str
    overrides: Sequence[str] = ()
    first: str | None = None
    """As of `up`, like the two below."""
    last: str | None = None
    fresh: bool = False
    name: str | None = None
    """Of the job; made up without one."""
    price: float | None = None
    """USD per hour of a device."""

    @property
    def options(self) -> list[str]:
        """As the command line takes them."""
        bounds = (("--from", self.first), ("--to", self.last))
        given = [word for option, value in bounds if value for word in (option, value)]
        return [*given, *(["--fresh"] if self.fresh else [])]


def order(wish: Wish, folder: Path) -> Order:
    """Check a job here, before anything goes to a cluster.

    Args:
        folder: working directory; a recipe file must lie in it.

    Raises:
        UsageError: for what the job would refuse after minutes of waiting, and for a token among
            its arguments.
    """
    changes = list(wish.overrides)
    if _serves(wish) and not any(change.startswith("serve.wait=") for change in changes):
        changes.append("serve.wait=false")  # nobody sits at a job's Ctrl-C
    config = loading.load(wish.recipe, changes)
    _check_root(config)
    _check_words(wish)
    words = [wish.verb, _inside(wish.recipe, folder), *wish.options, *changes]
    return Order(
        wish.name or f"{config.name}-{wish.verb}-{secrets.token_hex(3)}",
        shlex.join(["python", "-m", "cluster.cli", *words]),
        measure(folder),
        _told(wish, config),
    )


def _told(wish: Wish, config: RunConfig) -> dict[str, str]:
    """Metadata, which the job's page in Ray's dashboard shows: what it is, and where to look on."""
    told = {"heliostat": wish.verb, "recipe": config.name, "root": config.storage.root}
    chosen = urllib.parse.urlencode({f"var-{TRAINING.variable}": config.name})
    grafana = os.environ.get(GRAFANA_VARIABLE, GRAFANA).rstrip("/")
    told["dashboards"] = f"{grafana}/d/{TRAINING.uid}?{chosen}"
    if config.registry.uri and config.registry.uri.startswith("http"):
        told["mlflow"] = config.registry.uri
    if wish.price is not None:
        told[PRICE] = str(wish.price)
    return told


def _serves(wish: Wish) -> bool:
    """Whether a service is started in the end; refuses verbs and stages that there are not."""
    if wish.verb == "up":
        return between(wish.first, wish.last)[-1].verb == "serve"
    if wish.first or wish.last:
        raise UsageError(f"--from and --to are of `up`, not of {wish.verb}")
    if wish.verb != "doctor":
        between(wish.verb, wish.verb)
    return wish.verb == "serve"


def _check_words(wish: Wish) -> None:
    token, name = read_token(), wish.name
    if token is not None and any(token in w for w in (*wish.overrides, wish.recipe, name or "")):
        raise UsageError("the token is among the arguments, where every log shows it: leave it out")
    if name is not None and NAME.fullmatch(name) is None:
        raise UsageError(f"job name {name!r}: take letters, digits, dots and dashes, at most 100")


def _check_root(config: RunConfig) -> None:
    root = config.storage.root
    if "://" not in root and not root.startswith(("/", "~")):
        raise UsageError(
            f"storage.root {root} is relative, and a job's working directory is a temporary copy: "
            "give an absolute path that all nodes share, or a URI"
        )


def _inside(recipe: str, folder: Path) -> str:
    """A recipe's name as it is, its file as the job finds it."""
    path = Path(recipe)
    if not path.exists():
        return recipe
    try:
        return str(path.resolve().relative_to(folder.resolve()))
    except ValueError:
        raise UsageError(
            f"{path} is outside of the working directory {folder} and would not travel with the "
            "job: move it, or name another with --working-dir"
        ) from None


def client(address: str) -> Any:
    """Ray's client of the job API.

    Raises:
        ClusterError: if no cluster answers, or it does not take the token.
    """
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, OSError) as error:
        raise ClusterError(
            f"no cluster takes jobs at {address} ({_first_line(error)}): open the tunnel with "
            "`ray dashboard FILE.yaml`, see `heliostat cluster check`"
        ) from None


def submit(jobs: Any, wanted: Order) -> None:
    """
    Raises:
        ClusterError: if the cluster refuses it.
    """
    try:
        jobs.submit_job(
            entrypoint=wanted.command,
            submission_id=wanted.name,
            runtime_env={"working_dir": str(wanted.upload.folder)},
            metadata=wanted.metadata,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"job {wanted.name} was refused: {_first_line(error)}") from None


def follow(jobs: Any, name: str) -> int:
    """Show a job's log until it ends; a tunnel that breaks is waited for.

    Returns:
        The job's exit code.

    Raises:
        ClusterError: if the cluster stays away.
    """
    import aiohttp

    shown = Shown()
    broken = 0
    while True:
        before = shown.characters
        try:
            asyncio.run(_tail(jobs, name, shown))
            info = jobs.get_job_info(name)
            if str(info.status.value) in ENDED:
                shown.close()
                return _exit_code(info)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            broken = 0 if shown.characters > before else broken + 1
            if broken > PATIENCE:
                raise ClusterError(
                    f"the cluster does not answer ({_first_line(error)}); job {name} may go on: "
                    f"`heliostat jobs` when it does"
                ) from None
        time.sleep(RECONNECT_SECONDS)


async def _tail(jobs: Any, name: str, shown: "Shown") -> None:
    shown.again()
    async for text in jobs.tail_job_logs(name):
        shown.take(text)


def _exit_code(info: Any) -> int:
    if str(info.status.value) == "SUCCEEDED":
        return 0
    code = info.driver_exit_code
    return int(code) if code else 1


class Shown:
    """A log on its way to the screen: whole lines, each once, progress as a bar on a terminal."""

    def __init__(self, say: Callable[[str], None] = progress.say) -> None:
        self._say, self._rest = say, ""
        self.characters, self._skip = 0, 0
        self._bar: Any = None
        """Context of the bar on the terminal, and what it gave."""
        self._drawn: Any = None
        self._label = ""

    def again(self) -> None:
        """The log is sent from its beginning: what was shown is not shown again."""
        self._skip = self.characters

    def take(self, text: str) -> None:
        dropped = min(self._skip, len(text))
        self._skip -= dropped
        text = text[dropped:]
        self.characters += len(text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line.rstrip("\r"))

    def close(self) -> None:
        if self._rest:
            self._line(self._rest)
        self._rest = ""
        self._end_bar()

    def _line(self, line: str) -> None:
        reading = progress.read(line)
        if reading is None or not progress.console().is_terminal:
            self._end_bar()
            self._say(line)
            return
        if self._bar is None or self._label != reading.label:
            self._end_bar()
            self._bar = progress.bar(reading.label, reading.total, reading.unit)
            self._drawn, self._label = self._bar.__enter__(), reading.label
        self._drawn.update(reading.done, reading.note)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar = None


@dataclass(frozen=True)
class Row:
    """A line of `heliostat jobs`."""

    name: str
    status: str
    age: float
    """Seconds since it was submitted."""
    stage: str
    place: str
    """How far it is, such as `30/750 steps`."""
    goodput: str
    cost: str = ""
    """In USD, where it is known."""


def listing(jobs: Any, held: Iterable[Held] = (), now: float | None = None) -> list[Row]:
    """The jobs that a cluster knows, the newest last.

    Args:
        held: what their workers had, of all jobs.
    """
    by_job: dict[str, list[Held]] = {}
    for part in held:
        by_job.setdefault(part.job, []).append(part)
    try:
        known = [info for info in jobs.list_jobs() if info.submission_id]
        return [
            row(
                info,
                "" if info.status.value == "PENDING" else _log(jobs, info),
                by_job.get(info.job_id or "", ()),
                now,
            )
            for info in sorted(known, key=lambda info: info.start_time or 0)
        ]
    except (RuntimeError, OSError) as error:
        raise ClusterError(f"the cluster does not list its jobs: {_first_line(error)}") from None


def _log(jobs: Any, info: Any) -> str:
    try:
        return str(jobs.get_job_logs(info.submission_id))
    except RuntimeError:
        return ""  # of a node that is gone


def row(info: Any, log: str, held: Iterable[Held] = (), now: float | None = None) -> Row:
    """What a job's log says of how far it is, and what it has cost so far."""
    begun = (info.start_time or 0) / 1000
    ended = info.end_time / 1000 if info.end_time else (now or time.time())
    stage, reading = position(log)
    place = f"{reading.done}/{reading.total} {reading.unit}" if reading else ""
    return Row(
        info.submission_id,
        info.status.value.lower(),
        max(0.0, ended - begun),
        stage,
        place,
        reading.goodput if reading else "",
        _cost(held, (info.metadata or {}).get(PRICE)),
    )


def _cost(held: Iterable[Held], price: str | None) -> str:
    found = dollars(held, float(price) if price else None)
    return "" if found is None else f"{found:,.2f} USD"


def position(log: str) -> tuple[str, progress.Reading | None]:
    """The stage that a log speaks of last, and its last line of progress."""
    stage, reading = "", None
    for line in log.splitlines():
        head = line.split(":", 1)[0]
        if head in BY_VERB and head != stage:
            stage, reading = head, None
        reading = progress.read(line) or reading
    return stage, reading


def duration(seconds: float) -> str:
    """`3 m 20 s` and the like."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} m"
    return f"{minutes} m {rest} s" if minutes else f"{rest} s"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
