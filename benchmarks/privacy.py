"""De-identification against presidio-analyzer: recall, precision and speed on the same documents.

    python benchmarks/privacy.py --peer-python VENV/bin/python

Two thousand generated documents (tests/personal_texts.py: English, Chinese, German, French and
Spanish; full-width digits, line breaks, invisible characters; order numbers, ISBNs, hashes,
versions, prices and tables as traps) and a sample of the standard library's source. The sides run
block by block in turn, each in a process of its own; speed is by CPU time, which a busy neighbour
disturbs least. A value counts as found when a span of its type covers all of it; a span counts as
right when four fifths of it lie in a value of its type.

Presidio runs with the pattern recognisers that it has for these types, for all languages at once,
a blank spaCy pipeline for its context words, and the threshold of its own demo, 0.35; its phone
recogniser is given our regions. It finds no Chinese, French, Dutch or Brazilian national number.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Spans = list[tuple[int, int, str]]
COMMON = ("email", "phone", "card", "iban", "ip", "mac")
"""Types that both sides know everywhere."""
BLOCK = 100
SOURCE_BYTES = 1_500_000
REGIONS = ("US", "GB", "DE", "FR", "ES", "IT", "NL", "BE", "CH", "AT", "PL", "PT")
REGIONS += ("CN", "IN", "BR", "MX", "JP", "AU")
THRESHOLD = 0.35


# ------------------------------------------------------------------ sides


def heliostat() -> Callable[[str], Spans]:
    from cluster.config.privacy import PrivacySection
    from pipelines.data.privacy.scrub import Scrubber

    scrub = Scrubber(PrivacySection(phone_regions=REGIONS)).scrub
    return lambda text: [(s.start, s.end, s.type) for s in scrub(text).spans]


def presidio() -> Callable[[str], Spans]:
    import presidio_analyzer.predefined_recognizers as known
    import spacy
    import tldextract.tldextract
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import SpacyNlpEngine
    from spacy.language import Language

    # Its e-mail recogniser would fetch the list of public suffixes; the one that it carries does.
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=())

    @Language.component("lower_lemmas")
    def lower_lemmas(doc: Any) -> Any:
        for token in doc:
            token.lemma_ = token.lower_
        return doc

    class Blank(SpacyNlpEngine):
        def __init__(self) -> None:
            super().__init__()
            nlp = spacy.blank("en")
            nlp.add_pipe("lower_lemmas")
            self.nlp = {"en": nlp}

        def load(self) -> None:
            pass

    entities = {
        "EMAIL_ADDRESS": "email",
        "CREDIT_CARD": "card",
        "IBAN_CODE": "iban",
        "IP_ADDRESS": "ip",
        "MAC_ADDRESS": "mac",
        "PHONE_NUMBER": "phone",
        **dict.fromkeys(("US_SSN", "US_ITIN", "ES_NIF", "ES_NIE"), "national_id"),
        **dict.fromkeys(("IT_FISCAL_CODE", "PL_PESEL", "UK_NINO", "DE_TAX_ID"), "national_id"),
    }
    names = ["Email", "CreditCard", "Iban", "Ip", "MacAddress", "UsSsn", "UsItin", "EsNif", "EsNie"]
    names += ["ItFiscalCode", "PlPesel", "UkNino", "DeTaxId"]
    registry = RecognizerRegistry()
    for name in names:
        recogniser = getattr(known, f"{name}Recognizer")
        registry.add_recognizer(recogniser(supported_language="en"))
    registry.add_recognizer(known.PhoneRecognizer(supported_regions=REGIONS))
    engine = AnalyzerEngine(
        registry=registry,
        nlp_engine=Blank(),
        supported_languages=["en"],
        log_decision_process=False,
    )

    def analyse(text: str) -> Spans:
        results = engine.analyze(text, "en", list(entities), score_threshold=THRESHOLD)
        return _best([(r.start, r.end, entities[r.entity_type], r.score) for r in results])

    return analyse


def _best(found: list[tuple[int, int, str, float]]) -> Spans:
    """Of what overlaps, the surest, then the longest: what presidio's anonymiser would replace."""
    kept: Spans = []
    for start, end, kind, _ in sorted(found, key=lambda f: (-f[3], f[0] - f[1])):
        if all(end <= a or b <= start for a, b, _ in kept):
            kept.append((start, end, kind))
    return sorted(kept)


SIDES = {"heliostat": heliostat, "presidio": presidio}


def serve(side: str, path: str) -> None:
    """Answer each line, the first and last text of a block, with CPU seconds and spans."""
    texts = json.loads(Path(path).read_text("utf-8"))
    find = SIDES[side]()
    for text in texts[:40]:
        find(text)
    print("ready", flush=True)
    for line in sys.stdin:
        first, last = map(int, line.split())
        began = time.process_time()
        spans = [find(text) for text in texts[first:last]]
        seconds = time.process_time() - began
        print(json.dumps({"seconds": seconds, "spans": spans}), flush=True)


class Side:
    def __init__(self, name: str, python: str, texts: Path) -> None:
        command = [python, __file__, "--serve", name, str(texts)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.seconds: Counter[str] = Counter()
        self.spans: list[Spans] = []
        assert self._process.stdout and self._process.stdout.readline() == "ready\n"

    def block(self, kind: str, first: int, last: int) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{first} {last}\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        self.seconds[kind] += answer["seconds"]
        self.spans += answer["spans"]

    def end(self) -> None:
        self._process.communicate()


# ------------------------------------------------------------------ scores


def scores(
    drafts: Sequence[Any], found: Sequence[Spans], kinds: Iterable[str]
) -> dict[str, tuple[float, float, int]]:
    """Recall, precision and number of values of each type, and of `all` together."""
    labels, hits, spans, right = Counter(), Counter(), Counter(), Counter()  # type: ignore[var-annotated]
    wanted = set(kinds)
    for draft, result in zip(drafts, found, strict=True):
        for label in draft.labels:
            if label.type in wanted:
                labels[label.type] += 1
                hits[label.type] += any(
                    kind == label.type and start <= label.start and label.end <= end
                    for start, end, kind in result
                )
        for start, end, kind in result:
            if kind in wanted:
                spans[kind] += 1
                right[kind] += any(
                    kind == label.type
                    and min(end, label.end) - max(start, label.start) >= 0.8 * (end - start)
                    for label in draft.labels
                )
    for counter in (labels, hits, spans, right):
        counter["all"] = counter.total()
    return {
        kind: (hits[kind] / labels[kind], right[kind] / max(1, spans[kind]), labels[kind])
        for kind in [*sorted(wanted & labels.keys()), "all"]
    }


def source_texts() -> list[str]:
    """Files of the standard library, spread over the alphabet."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::3]
    texts: list[str] = []
    for file in files:
        texts.append(file.read_text("utf-8", "replace"))
        if sum(map(len, texts)) > SOURCE_BYTES:
            break
    return texts


def size(texts: Sequence[str]) -> float:
    """MB of UTF-8."""
    return sum(len(text.encode()) for text in texts) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="interpreter that has presidio-analyzer")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.personal_texts import KINDS, documents

    drafts = documents(arguments.documents, arguments.seed)
    labelled, source = [draft.text for draft in drafts], source_texts()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.json"
        path.write_text(json.dumps(labelled + source), encoding="utf-8")
        sides = {"heliostat": Side("heliostat", sys.executable, path)}
        if arguments.peer_python:
            sides["presidio"] = Side("presidio", arguments.peer_python, path)
        blocks = [
            ("labelled", n, min(n + BLOCK, len(labelled))) for n in range(0, len(labelled), BLOCK)
        ]
        first = len(labelled)
        blocks += [("source", first + n, first + n + 4) for n in range(0, len(source), 4)]
        for block in blocks:
            for side in sides.values():
                side.block(*block)
        for side in sides.values():
            side.end()
    figures: dict[str, float] = {}
    for name, side in sides.items():
        for label, kinds in (("all types", (*KINDS, "private_key")), ("common types", COMMON)):
            if name == "presidio" and label == "all types":
                kinds = (*COMMON, "national_id")
            result = scores(drafts, side.spans[: len(drafts)], kinds)
            print(f"\n{name}, {label}: recall, precision, values")
            for kind, (recall, precision, count) in result.items():
                print(f"  {kind:<12} {recall:.4f}  {precision:.4f}  {count}")
            key = f"{name}_{label.split()[0]}"
            figures[f"{key}_recall"], figures[f"{key}_precision"] = result["all"][:2]
        for kind, texts in (("labelled", labelled), ("source", source)):
            figures[f"{name}_{kind}_mb_per_s"] = size(texts) / side.seconds[kind]
    if "presidio" in sides:
        for kind in ("labelled", "source"):
            ratio = sides["presidio"].seconds[kind] / sides["heliostat"].seconds[kind]
            figures[f"{kind}_times_as_fast_as_presidio"] = ratio
    found = Counter(kind for spans in sides["heliostat"].spans[len(drafts) :] for *_, kind in spans)
    print(f"\nheliostat in {size(source):.1f} MB of source: {dict(found)}")
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    print(json.dumps({"figures": figures}))


if __name__ == "__main__":
    main()
