"""The generation engine: scheduling, text, sampling, and parity with `generate`."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ServingError
from serving.engines.base import (
    Chat,
    Encoded,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Prompt,
    SamplingParameters,
    Started,
    TextRequest,
    Tokens,
)
from serving.engines.generation import CausalRunner, GenerationEngine, draw
from serving.engines.scheduler import Scheduler, Step
from serving.engines.text import TextStream
from serving.engines.tokenizer import PromptError
from tests import tiny_model


def test_requests_join_one_per_step_and_leave_their_place_to_the_next() -> None:
    scheduler = Scheduler(slots=2, max_waiting=2)
    assert [scheduler.submit(name) for name in "abcd"] == [True] * 4
    assert scheduler.next_step() == Step("a", ())
    assert scheduler.next_step() == Step("b", ("a",))
    assert scheduler.next_step() == Step(None, ("a", "b"))
    scheduler.remove("a")
    assert scheduler.next_step() == Step("c", ("b",))


def test_the_queue_is_bounded_and_waiting_requests_can_be_given_up() -> None:
    scheduler = Scheduler(slots=1, max_waiting=1)
    assert scheduler.submit("a") and scheduler.submit("b")
    assert not scheduler.submit("c")
    scheduler.remove("b")
    scheduler.remove("never seen")
    assert scheduler.submit("d")
    assert (scheduler.running, scheduler.waiting) == (0, 2)


def _bytes_decode(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["你好，世界🌞", "naïve", "a\ufffdb", "plain"])
def test_no_character_is_cut_and_nothing_is_lost(text: str) -> None:
    stream = TextStream(_bytes_decode)
    pieces = [stream.push(byte)[0] for byte in text.encode()] + [stream.flush()]
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
        # Each character comes as soon as its last byte is there.
        assert [p for p in pieces if p] == list(text)


def test_bytes_that_are_no_text_come_out_as_the_decoder_shows_them() -> None:
    raw = bytes([0xFF, 0xE4, 0xBD, 0x41, 0xC3, 0x28, 0xF0, 0x9F])
    stream = TextStream(_bytes_decode)
    assert "".join([stream.push(b)[0] for b in raw]) + stream.flush() == _bytes_decode(raw)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(("END",), "one EN two "), (("two", "one EN"), ""), (("世界",), None), (("zzz",), None)],
)
def test_a_stop_string_never_leaks(stop: tuple[str, ...], expected: str | None) -> None:
    text = "one EN two END three"
    stream = TextStream(_bytes_decode, stop)
    seen, ended = "", False
    for byte in text.encode():
        piece, ended = stream.push(byte)
        seen += piece
        if ended:
            break
    if expected is None:
        assert not ended and seen + stream.flush() == text
    else:
        assert ended and seen == expected


def test_a_chinese_stop_string_across_tokens() -> None:
    stream = TextStream(_bytes_decode, ("世界",))
    seen = [stream.push(byte) for byte in "你好世界".encode()]
    assert "".join(piece for piece, _ in seen) == "你好"
    assert seen[-1][1]


def test_sampling_follows_its_parameters() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])

    def draws(**parameters: Any) -> set[int]:
        sampling = SamplingParameters(max_tokens=1, **parameters)
        generator = torch.Generator().manual_seed(0)
        return {draw(logits, sampling, generator) for _ in range(300)}

    assert draws() == {0, 1, 2, 3}
    assert draws(top_k=2) == {1, 2}
    assert draws(top_p=0.0) == {1}
    assert draws(top_p=0.7) == {1, 2}  # 0.64 alone is less than 0.7
    assert draws(temperature=1e-30) == {1}


class ScriptedRunner:
    """Counts up from the last token; can be held, or made to fail."""

    context_length, vocabulary, end = 64, 256, frozenset([255])

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.steps = 0
        self.fault: Exception | None = None

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            raise PromptError("no chat template")
        return tuple(prompt.encode())

    def piece(self, token: int) -> tuple[str, bytes]:
        return _bytes_decode([token]), bytes([token])

    def decode(self, tokens: Sequence[int]) -> str:
        return _bytes_decode(tokens)

    def new_cache(self) -> Any:
        return []

    def forward(self, cache: Any, tokens: Sequence[int]) -> torch.Tensor:
        self.gate.wait()
        self.steps += 1
        if self.fault:
            raise self.fault
        return torch.nn.functional.one_hot(torch.tensor((tokens[-1] + 1) % 256), 256).float()


def request(prompt: Any = "a", name: str = "r", echo: bool = False, **sampling: Any) -> Any:
    parameters = SamplingParameters(**({"max_tokens": 4, "temperature": 0} | sampling))
    return GenerationRequest(name, prompt, parameters, echo)


async def answer(engine: GenerationEngine, asked: GenerationRequest | TextRequest) -> list[Event]:
    return [event async for event in engine.submit(asked)]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Started | Tokens))


def run(
    runner: ScriptedRunner, *asked: GenerationRequest | TextRequest, slots: int = 2
) -> list[list[Event]]:
    engine = GenerationEngine("model/fake@1", runner, slots=slots, max_waiting=8)

    async def all_of_them() -> list[list[Event]]:
        return await asyncio.gather(*(answer(engine, one) for one in asked))

    try:
        return asyncio.run(all_of_them())
    finally:
        engine.close()


def test_ends_by_length_by_stop_and_by_end_of_text() -> None:
    length, stop, end, echo = run(
        ScriptedRunner(),
        request("a", "1"),
        request("a", "2", stop=("de",)),
        request((252,), "3", max_tokens=9),
        request("a", "4", echo=True),
    )
    assert (text_of(length), length[-1]) == ("bcde", Finished("length", 4))
    assert (text_of(stop), stop[-1]) == ("bc", Finished("stop", 4))
    assert (text_of(end), end[-1]) == ("\ufffd\ufffd", Finished("stop", 3))
    assert text_of(echo) == "abcde"
    assert length[0] == Started("model/fake@1", 1)


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (request("a" * 61), "context_length_exceeded"),
        (request("", max_tokens=1), None),
        (request((256,)), None),
    ],
)
def test_what_can_never_be_answered_is_refused(asked: GenerationRequest, code: str | None) -> None:
    [[failed]] = run(ScriptedRunner(), asked)
    assert isinstance(failed, Failed)
    assert (failed.status, failed.code, failed.param) == (400, code, "prompt")


def test_the_tokenizer_answers_for_itself_and_a_base_model_refuses_chats() -> None:
    [[encoded], [decoded], [outside], [chat]] = run(
        ScriptedRunner(),
        TextRequest("1", "好a"),
        TextRequest("2", (0xE5, 0xA5, 0xBD, 97)),
        TextRequest("3", (97, 256)),
        TextRequest("4", Chat(({"role": "user", "content": "好"},))),
    )
    assert encoded == decoded == Encoded((0xE5, 0xA5, 0xBD, 97), ("\ufffd",) * 3 + ("a",), "好a")
    assert isinstance(outside, Failed) and outside.status == 400 and "256" in outside.message
    assert chat == Failed(400, "no chat template", None, "messages")


def test_a_prompt_that_just_fits_is_answered() -> None:
    [events] = run(ScriptedRunner(), request("a" * 60))
    assert events[-1] == Finished("length", 4)


def test_the_queue_refuses_with_503_and_a_closed_iterator_frees_its_slot() -> None:
    runner = ScriptedRunner()
    runner.gate.clear()
    engine = GenerationEngine("model/fake@1", runner, slots=1, max_waiting=0)

    async def scenario() -> None:
        first = engine.submit(request(name="1"))
        assert isinstance(await anext(first), Started)
        [refused] = await answer(engine, request(name="2"))
        assert isinstance(refused, Failed) and refused.status == 503 and refused.retry_after
        await first.aclose()
        assert engine.stats().running + engine.stats().waiting == 0
        runner.gate.set()
        assert text_of(await answer(engine, request(name="3"))) == "bcde"

    asyncio.run(scenario())
    # The cancelled one took the step that it was in and no other.
    assert runner.steps <= 1 + 4
    engine.close()


def test_a_fault_reaches_the_caller_and_the_health_check() -> None:
    runner = ScriptedRunner()
    engine = GenerationEngine("model/fake@1", runner, slots=1, max_waiting=1)
    runner.fault = RuntimeError("out of memory")
    # pytest would report the thread's own traceback as a warning; the engine's is what counts.
    threading.excepthook, before = lambda _: None, threading.excepthook
    try:
        *_, failed = asyncio.run(answer(engine, request()))
        engine._thread.join(5)
    finally:
        threading.excepthook = before
    assert isinstance(failed, Failed) and failed.status == 500
    with pytest.raises(ServingError, match="out of memory"):
        engine.check()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model.write(path)
    return path


def test_greedy_equals_generate_alone_and_with_neighbours(folder: Path) -> None:
    prompts = ["def ", "你好", "x", "import os\n\n", "The quick brown fox"]
    expected = [tiny_model.greedy(folder, prompt, 40) for prompt in prompts]
    runner = CausalRunner(folder, tiny_model.CONTEXT)
    asked = [request(p, str(i), max_tokens=40) for i, p in enumerate(prompts)]
    together = run(runner, *asked, slots=4)  # type: ignore[arg-type]
    [alone] = run(runner, asked[1])  # type: ignore[arg-type]
    for events, (ids, text) in zip([*together, alone], [*expected, expected[1]], strict=True):
        assert [i for e in events if isinstance(e, Tokens) for i in e.ids] == ids
        assert text_of(events) == text
    assert len({tuple(ids) for ids, _ in expected}) == len(prompts)


def test_a_seed_gives_the_same_text_whatever_its_neighbours(folder: Path) -> None:
    runner: Any = CausalRunner(folder, tiny_model.CONTEXT)

    def drawn(name: str, seed: int | None) -> GenerationRequest:
        return request("a", name, max_tokens=24, temperature=1.0, seed=seed)

    [alone] = run(runner, drawn("1", 7))
    same, other, free = run(runner, drawn("1", 7), drawn("2", 8), drawn("3", None), slots=3)
    assert text_of(alone) == text_of(same)
    assert len({text_of(e) for e in (same, other, free)}) == 3
