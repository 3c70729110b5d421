"""The generation engine around a scripted model: ends, refusals, faults."""

import asyncio
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from cluster.errors import ServingError
from serving.engines import generation
from serving.engines.base import (
    Chat,
    Encoded,
    Failed,
    Finished,
    GenerationRequest,
    Prompt,
    Started,
    TextRequest,
)
from serving.engines.generation import GenerationEngine
from serving.engines.generation import _put as put
from serving.engines.runner import Feed
from tests.engines import TableRunner, answer, request, run, text_of


class ScriptedRunner(TableRunner):
    """Counts up from the last token; can be held, or made to fail."""

    context_length, vocabulary, end = 64, 256, frozenset([255])

    def __init__(self, slots: int = 2) -> None:
        super().__init__(slots, spare=0, chunk=None)
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.encoded: list[Prompt] = []

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        self.encoded.append(prompt)
        return super().encode(prompt)

    def forward(self, decode: Sequence[Feed], prompts: Sequence[Feed]) -> torch.Tensor:
        self.gate.wait()
        self.steps += 1
        if self.fault:
            raise self.fault
        last = [(feed.tokens[-1] + 1) % 256 for feed in (*decode, *prompts)]
        return torch.nn.functional.one_hot(torch.tensor(last), 256).float()


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


@pytest.mark.parametrize("whole", [False, True])
def test_a_whole_answer_is_the_same_and_wakes_its_caller_twice_only(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivered: list[int] = []
    monkeypatch.setattr(
        generation, "_put", lambda batch: (delivered.append(len(batch)), put(batch))
    )
    [events] = run(ScriptedRunner(), replace(request("a", max_tokens=20), whole=whole))
    assert text_of(events) == "".join(map(chr, range(98, 118)))
    assert events[-1] == Finished("length", 20) and sum(delivered) == 21
    assert len(delivered) == (2 if whole else 20)


def test_the_queue_refuses_with_503_and_a_closed_iterator_frees_its_slot() -> None:
    runner = ScriptedRunner(slots=1)
    runner.gate.clear()
    engine = GenerationEngine("model/fake@1", runner, max_waiting=0)

    async def scenario() -> None:
        first = engine.submit(request(name="1"))
        assert isinstance(await anext(first), Started)
        [refused] = await answer(engine, request("长" * 99, name="2"))
        assert isinstance(refused, Failed) and refused.status == 503 and refused.retry_after
        assert runner.encoded == ["a"]  # who is refused costs no tokenizing
        await first.aclose()
        assert engine.stats().running + engine.stats().waiting == 0
        runner.gate.set()
        assert text_of(await answer(engine, request(name="3"))) == "bcde"

    asyncio.run(scenario())
    # The cancelled one took the step that it was in and no other.
    assert runner.steps <= 1 + 4
    engine.close()


@pytest.mark.skipif(sys.platform != "linux", reason="a priority is a thread's own on Linux only")
def test_what_computes_lets_the_rest_of_the_process_go_first() -> None:
    found: list[tuple[int, int]] = []

    class Looking(TableRunner):
        def forward(self, decode: Sequence[Feed], prompts: Sequence[Feed]) -> torch.Tensor:
            thread = threading.get_native_id()
            found.append((thread, os.getpriority(os.PRIO_PROCESS, thread)))
            return super().forward(decode, prompts)

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    run(Looking(), request("def ", max_tokens=2))
    assert found and {priority for _, priority in found} == {generation.LAST}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_a_fault_reaches_the_caller_and_the_health_check() -> None:
    runner = ScriptedRunner(slots=1)
    engine = GenerationEngine("model/fake@1", runner, max_waiting=1)
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
