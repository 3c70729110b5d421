"""The verb `deidentify`: the privacy rules alone, over a file of JSON lines, without a cluster."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cluster.config.privacy import PrivacySection
from cluster.durable import durable, storage_errors
from cluster.errors import SourceError, UsageError
from pipelines.data.privacy.scrub import Scrubber

MAX_LINE_BYTES = 64 * 2**20
"""Longer lines are rejected; none is held in memory whole before that is known."""


@dataclass
class Tally:
    """What was done, in numbers and places; no text."""

    rows: int = 0
    """Lines written."""
    changed: int = 0
    """Of those, lines in which something was found."""
    overwritten: int = 0
    """Of those, lines whose own field `spans` gave way."""
    rejected: int = 0
    """Lines that are in the file of rejects instead."""
    first_rejects: list[str] = field(default_factory=list)
    types: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Bad:
    reason: str


def run(source: Path, target: Path, settings: PrivacySection) -> Tally:
    """Rewrite the field `text` of each line, and add `spans`, which are those of the old text.

    The output appears whole or not at all. Lines that cannot be read are named in a second file,
    `TARGET.rejects`, by file, row and reason.

    Raises:
        SourceError: if the source cannot be read or has no line with text; nothing is written.
        UsageError: if source and target are the same file.
    """
    if not source.is_file():
        raise SourceError(f"{source} is not a file: give one of JSON lines with a field `text`")
    if target.exists() and target.samefile(source):
        raise UsageError(f"{target} is the file that is read: write to another one")
    scrubber, tally = Scrubber(settings), Tally()
    rejects = rejects_of(target)
    with (
        storage_errors(f"de-identify {source} to {target}"),
        source.open("rb") as lines,
        durable(target) as out,
        durable(rejects) as bad,
    ):
        for number, line in enumerate(_lines(lines), start=1):
            row = _row(line, scrubber, tally)
            if isinstance(row, Bad):
                bad.write(_reject(source, number, row, tally))
            elif row is not None:
                out.write(row)
        if not tally.rows:
            raise SourceError(_nothing(source, tally))
    if not tally.rejected:
        rejects.unlink()
    return tally


def rejects_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.rejects")


def _lines(stream: IO[bytes]) -> Iterator[bytes | Bad]:
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES)
        yield Bad(f"a line over {MAX_LINE_BYTES} bytes")


def _row(line: bytes | Bad, scrubber: Scrubber, tally: Tally) -> bytes | Bad | None:
    """The line that goes out; None for an empty one."""
    if isinstance(line, Bad) or not line.strip():
        return line if isinstance(line, Bad) else None
    tree = _parsed(line)
    if isinstance(tree, Bad):
        return tree
    scrubbed = scrubber.scrub(tree["text"])
    overwritten = "spans" in tree
    spans = [{"type": s.type, "start": s.start, "end": s.end} for s in scrubbed.spans]
    try:
        changed = tree | {"text": scrubbed.text, "spans": spans}
        raw = json.dumps(changed, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        return Bad("half a surrogate pair, which is not text")
    except ValueError:
        return Bad("a number that JSON has no word for")
    tally.rows += 1
    tally.changed += bool(spans)
    tally.overwritten += overwritten
    tally.types.update(scrubbed.counts)
    return raw


def _parsed(line: bytes) -> dict[str, Any] | Bad:
    try:
        tree = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Bad("not UTF-8")
    except RecursionError:
        return Bad("JSON that is nested too deeply")
    except ValueError:
        return Bad("not JSON")
    if not isinstance(tree, dict) or not isinstance(tree.get("text"), str):
        return Bad("no field `text` that holds text")
    return tree


def _reject(source: Path, number: int, bad: Bad, tally: Tally) -> bytes:
    tally.rejected += 1
    if len(tally.first_rejects) < 10:
        tally.first_rejects.append(f"{source}:{number}: {bad.reason}")
    tree = {"file": str(source), "row": number, "reason": bad.reason}
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _nothing(source: Path, tally: Tally) -> str:
    first = f", such as {tally.first_rejects[0]}" if tally.first_rejects else ""
    return (
        f"{source} holds no line that is a JSON object with a field `text` "
        f"({tally.rejected} rejected{first}): nothing is written"
    )
