"""One contract for every engine: the fast path in each precision, the general one, one without a
model; and for classifiers what they have in common with those."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.engines.base import (
    Engine,
    Event,
    Failed,
    Finished,
    PredictionRequest,
    PromptScored,
    Started,
    TokenLogprob,
    Tokens,
    is_last,
)
from serving.engines.fast import FastRunner
from serving.engines.generation import GenerationEngine
from serving.engines.linear import Int8, Packed, Plain
from serving.engines.loading import Options, open_runner
from serving.engines.prediction import PredictionEngine
from serving.engines.runner import Feed
from tests import tiny_model
from tests.engines import (
    Subject,
    TableRunner,
    anew,
    answer,
    greedy,
    ids_of,
    need,
    reference_of,
    request,
    run,
    table,
    text_of,
)

KINDS: dict[str, tuple[Any, Any]] = {
    "fast": ("fp32", Plain),
    "fast-packed": ("fp32", Packed),
    "fast-constant": ("fp32", Packed),
    "fast-bf16": ("bf16", Packed),
    "fast-int8": ("int8", Int8),
}
SUBJECTS = ["table", "general", "general-constant", *KINDS]
PROMPTS = ["def ", "你好", "x", "import os\n\n", "The quick brown fox", "𝒳"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model.write(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request: pytest.FixtureRequest, folder: Path) -> Subject:
    if request.param == "table":
        return Subject(TableRunner, table)
    precision, kind = KINDS.get(request.param, ("fp32", Plain))
    need(kind, precision)
    opened = partial(_opened, request.param, folder)
    if precision == "fp32":
        return Subject(opened, reference_of(folder))
    return Subject(opened, anew(opened(slots=1, spare=0)))


def _opened(kind: str, folder: Path, slots: int = 4, spare: int = 2) -> Any:
    from transformers import AutoModelForCausalLM

    if kind.startswith("general"):
        constant = kind == "general-constant"
        options = Options(slots, fast=False, constant_shape=constant)
        opened: Any = open_runner(folder, tiny_model.CONTEXT, options)
        assert opened.constant == (constant or slots == 1)
        return opened
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    precision, held = KINDS[kind]
    constant = kind == "fast-constant"
    spare = 0 if constant else spare
    runner = FastRunner(
        model, folder, slots=slots, length=tiny_model.CONTEXT, spare=spare, kind=held,
        precision=precision, constant=constant,
    )  # fmt: skip
    runner.chunk = 16  # so that prompts of these tests are longer than a chunk
    return runner


def test_greedy_is_right_alone_and_among_neighbours_that_come_and_go(subject: Subject) -> None:
    runner = subject.runner()
    rng = random.Random(5)
    long = [
        "A long beginning that several share, 世界. " + tail for tail in ("", "One", "Two", "三")
    ]
    prompts = [*PROMPTS, *long, "z" * 70]
    counts = [rng.randint(1, 30) for _ in prompts]
    asked = [
        request(prompt, str(i), max_tokens=count)
        for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]
    delays = [rng.random() * 0.05 for _ in asked]
    together = run(runner, *asked, delays=delays)
    for prompt, count, events in zip(prompts, counts, together, strict=True):
        ids = runner.encode(prompt)
        expected = greedy(subject.reference, ids, count, runner.end)
        assert ids_of(events) == expected
        assert text_of(events) == runner.decode(expected)
    [alone] = run(runner, asked[1])
    assert ids_of(alone) == ids_of(together[1])


def test_the_context_can_be_filled_to_its_end(subject: Subject) -> None:
    runner = subject.runner(slots=2)
    prompt = tuple(b"ab" * 40)
    room = runner.context_length - len(prompt)
    full, beside = run(runner, request(prompt, max_tokens=room), request("x", max_tokens=9))
    assert ids_of(full) == greedy(subject.reference, prompt, room, runner.end)
    assert isinstance(full[-1], Finished) and len(ids_of(beside)) == 9
    [[refused]] = run(runner, request(prompt, max_tokens=room + 1))
    assert isinstance(refused, Failed) and refused.code == "context_length_exceeded"


def test_a_prompt_read_before_is_taken_over_with_the_same_result(subject: Subject) -> None:
    runner = subject.runner(slots=1)
    shared = "Everything that was read before need not be read again. "
    first, second, third = run(
        runner,
        request(shared + "one", "1", max_tokens=8),
        request(shared + "two", "2", max_tokens=8),
        request(shared + "two", "3", max_tokens=8),
    )
    for events, tail in ((first, "one"), (second, "two"), (third, "two")):
        ids = runner.encode(shared + tail)
        assert ids_of(events) == greedy(subject.reference, ids, 8, runner.end)
    cached = [events[-1].cached_tokens for events in (first, second, third)]  # type: ignore[union-attr]
    length = len(shared.encode())
    assert cached == ([0, length, length + 2] if runner.spare else [0, 0, 0])


def test_a_seed_gives_the_same_text_whatever_its_neighbours(subject: Subject) -> None:
    runner = subject.runner()

    def drawn(name: str, seed: int | None, **cuts: Any) -> Any:
        return request("a", name, max_tokens=20, temperature=1.0, seed=seed, **cuts)

    for cuts in ({}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.8}):
        [alone] = run(runner, drawn("1", 7, **cuts))
        same, other, free, minus = run(
            runner, drawn("1", 7, **cuts), drawn("2", 8), drawn("3", None, top_k=3), drawn("4", -7)
        )
        assert ids_of(alone) == ids_of(same)
        assert len({tuple(ids_of(e)) for e in (same, other, free, minus)}) == 4


def test_a_stop_string_ends_the_text_and_never_shows(subject: Subject) -> None:
    runner = subject.runner()
    [free] = run(runner, request("def ", max_tokens=24))
    text = text_of(free)
    stop = text[5:9]
    [stopped] = run(runner, request("def ", max_tokens=24, stop=(stop, "never there")))
    assert text_of(stopped) == text[: text.index(stop)]
    assert isinstance(stopped[-1], Finished) and stopped[-1].reason == "stop"


def _entries(events: list[Any]) -> list[TokenLogprob]:
    return [entry for event in events if isinstance(event, Tokens) for entry in event.logprobs]


def test_logprobs_are_those_of_the_model(subject: Subject) -> None:
    runner = subject.runner()
    asked = [
        request("你好", "1", max_tokens=6, logprobs=3),
        request("x", "2", max_tokens=6, logprobs=0, temperature=1.0, seed=1),
        request("y", "3", max_tokens=6),
    ]
    answers = run(runner, *asked)
    assert not _entries(answers[2])
    for one, events, top in zip(asked[:2], answers[:2], (3, 0), strict=True):
        prompt, ids = list(runner.encode(one.prompt)), ids_of(events)
        rows = subject.reference([*prompt, *ids])[len(prompt) - 1 : -1].log_softmax(-1)
        entries = _entries(events)
        assert [entry.token.id for entry in entries] == ids
        for row, token, entry in zip(rows, ids, entries, strict=True):
            assert entry.token.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert [t.id for t in entry.top] == row.topk(top).indices.tolist()
            assert [t.logprob for t in entry.top] == pytest.approx(
                row.topk(top).values.tolist(), abs=1e-4
            )
        raw = b"".join(entry.token.raw for entry in entries)
        assert raw.decode("utf-8", errors="replace") == text_of(events)


@pytest.mark.parametrize("wanted", [0, 2])
def test_a_prompt_can_be_scored(subject: Subject, wanted: int) -> None:
    runner = subject.runner()
    prompt = "The prompt itself, 一二三, longer than one chunk."
    # What was read before must not be taken over: it has no logits.
    run(runner, request(prompt))
    [events] = run(runner, request(prompt, max_tokens=wanted, echo=True, logprobs=2))
    ids = list(runner.encode(prompt))
    assert isinstance(events[0], Started) and events[0].text == prompt
    [scored] = [event for event in events if isinstance(event, PromptScored)]
    assert [entry.token.id for entry in scored.logprobs] == ids
    rows = subject.reference(ids).log_softmax(-1)
    own = [entry.token.logprob for entry in scored.logprobs]
    expected = rows[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()
    assert own[0] is None and own[1:] == pytest.approx(expected, abs=1e-4)
    assert scored.logprobs[1].top[0].id == int(rows[0].argmax())
    assert events[-1] == Finished("length", wanted)


def test_penalties_and_bias_change_the_choice_as_defined(subject: Subject) -> None:
    runner = subject.runner()
    prompt = runner.encode("def ")
    bias = {int(subject.reference(prompt)[-1].argmax()): -100.0, 65: 2.5}
    ids = list(prompt)
    for _ in range(20):
        logits = subject.reference(ids)[-1].clone()
        for token, change in bias.items():
            logits[token] += change
        for token in set(ids[len(prompt) :]):
            logits[token] -= 0.5 + 1.5 * ids[len(prompt) :].count(token)
        ids.append(int(logits.argmax()))
    [events, plain] = run(
        runner,
        request(
            "def ", "1", max_tokens=20, presence_penalty=0.5, frequency_penalty=1.5,
            logit_bias=tuple(bias.items()),
        ),
        request("def ", "2", max_tokens=20),
    )  # fmt: skip
    assert ids_of(events) == ids[len(prompt) :]
    assert ids_of(plain) == greedy(subject.reference, prompt, 20, runner.end)


def test_a_cancelled_request_frees_its_slot_within_a_step(subject: Subject) -> None:
    runner = subject.runner(slots=1)
    go_on, forward = threading.Event(), runner.forward

    def held(decode: Sequence[Feed], prompts: Sequence[Feed]) -> torch.Tensor:
        """The step after the first token lasts until it may end: no race with the assertions."""
        assert not decode or go_on.wait(60)
        return forward(decode, prompts)

    runner.forward = held  # type: ignore[method-assign]
    engine = GenerationEngine("model/fake@1", runner, max_waiting=1)

    async def scenario() -> None:
        first = engine.submit(request(name="1", max_tokens=100))
        assert isinstance(await anext(first), Started)
        assert isinstance(await anext(first), Tokens)
        waiting = asyncio.create_task(answer(engine, request("x", "2")))
        await asyncio.sleep(0.01)
        assert (engine.stats().running, engine.stats().waiting) == (1, 1)
        [refused] = await answer(engine, request(name="3"))
        assert isinstance(refused, Failed) and refused.status == 503 and refused.retry_after
        engine.cancel("1")
        assert engine.stats().running == 0
        go_on.set()
        expected = greedy(subject.reference, runner.encode("x"), 4, runner.end)
        assert ids_of(await waiting) == expected
        await first.aclose()
        assert engine.stats().running + engine.stats().waiting == engine.stats().queued_tokens == 0

    asyncio.run(scenario())
    engine.close()


def test_what_is_held_and_counted_is_told(subject: Subject) -> None:
    runner = subject.runner(slots=2)
    engine = GenerationEngine("model/fake@1", runner, max_waiting=4)
    asyncio.run(_both(engine))
    stats = engine.stats()
    assert (stats.prompt_tokens_total, stats.completion_tokens_total) == (30 + 2, 8)
    assert 0 <= stats.cache_tokens <= stats.cache_capacity
    assert stats.cache_capacity == (2 + runner.spare) * runner.context_length
    engine.close()


async def _both(engine: GenerationEngine) -> None:
    await asyncio.gather(answer(engine, request("a" * 30, "1")), answer(engine, request("bc", "2")))


def test_a_generation_engine_keeps_the_border(subject: Subject) -> None:
    runner = subject.runner(slots=1)
    go_on, forward = threading.Event(), runner.forward

    def held(decode: Sequence[Feed], prompts: Sequence[Feed]) -> torch.Tensor:
        assert go_on.wait(60)
        return forward(decode, prompts)

    runner.forward = held  # type: ignore[method-assign]
    engine = GenerationEngine("model/fake@1", runner, max_waiting=1)
    asyncio.run(keeps_the_border(engine, lambda name: request("x", name), go_on))


def test_a_prediction_engine_keeps_the_border() -> None:
    go_on = threading.Event()

    class Parrot:
        def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
            assert go_on.wait(60)
            return [{"label": value} for value in inputs]

    engine = PredictionEngine("model/fake@1", Parrot(), max_batch=1, max_waiting=1)
    asyncio.run(keeps_the_border(engine, lambda name: PredictionRequest(name, ("x",)), go_on))


async def keeps_the_border(
    engine: Engine, asked: Callable[[str], Any], go_on: threading.Event
) -> None:
    """What `base.Engine` promises, of one with a place to run and one to wait.

    Args:
        asked: a request of the name.
        go_on: until then the model computes.
    """

    async def events(name: str) -> list[Event]:
        return [event async for event in engine.submit(asked(name))]

    def held() -> tuple[int, int]:
        return engine.stats().running, engine.stats().waiting

    first, second = (asyncio.create_task(events(name)) for name in "12")
    await asyncio.sleep(0.05)
    assert held() == (1, 1)
    [refused] = await events("3")
    assert isinstance(refused, Failed) and (refused.status, refused.retry_after) == (503, 1)
    engine.cancel("nobody")
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert held() == (1, 0)
    third = asyncio.create_task(events("4"))  # in the place of who left
    await asyncio.sleep(0.05)
    go_on.set()
    for said in await asyncio.gather(first, third):
        assert isinstance(said[0], Started) and said[0].model == "model/fake@1"
        assert [is_last(event) for event in said] == [False] * (len(said) - 1) + [True]
        assert not isinstance(said[-1], Failed)
    assert held() == (0, 0)
    engine.check()
    engine.close()
