"""Dynamic batching around a predictor."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from cluster.errors import ServingError
from serving.engines.base import Event, Failed, Predicted, PredictionRequest, Started
from serving.engines.prediction import PredictionEngine


class Doubler:
    """Answers numbers with their double; refuses negative ones, faults on None."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        self.gate.wait()
        self.batches.append(len(inputs))
        for place, value in enumerate(inputs):
            if value is None:
                raise RuntimeError("broken")
            if value < 0:
                raise ValueError(f"input {place}: {value} is negative")
        return [{"label": str(2 * value)} for value in inputs]


async def ask(engine: PredictionEngine, name: str, *inputs: Any) -> list[Event]:
    return [event async for event in engine.submit(PredictionRequest(name, inputs))]


def run(predictor: Doubler, *requests: tuple[Any, ...]) -> list[list[Event]]:
    async def together() -> list[list[Event]]:
        engine = PredictionEngine("model/fake@1", predictor, max_batch=4, max_waiting=4)
        asked = [ask(engine, str(i), *inputs) for i, inputs in enumerate(requests)]
        answers = await asyncio.gather(*asked)
        assert engine.stats().running + engine.stats().waiting == 0
        engine.close()
        return answers

    return asyncio.run(together())


def labels(events: list[Event]) -> list[str]:
    assert events[0] == Started("model/fake@1") and isinstance(events[-1], Predicted)
    return [answer["label"] for answer in events[-1].answers]


def test_each_caller_gets_its_own_answers_in_order() -> None:
    answers = run(Doubler(), (1, 2), (3,), (4, 5))
    assert [labels(events) for events in answers] == [["2", "4"], ["6"], ["8", "10"]]


def test_what_arrives_during_a_batch_makes_up_the_next() -> None:
    predictor = Doubler()
    run(predictor, *[(i,) for i in range(7)])
    assert sum(predictor.batches) == 7 and max(predictor.batches) == 4


def test_a_bad_input_fails_its_own_request_only() -> None:
    good, bad, other = run(Doubler(), (1,), (2, -5), (3,))
    assert labels(good) == ["2"] and labels(other) == ["6"]
    assert bad[-1] == Failed(400, "inputs[1]: -5 is negative", None, "inputs")


def test_more_than_the_queue_holds_is_refused_and_the_rest_is_answered() -> None:
    first, second, third = run(Doubler(), (1,) * 4, (2,) * 4, (3,))
    assert len(labels(first)) == len(labels(second)) == 4
    [refused] = third
    assert isinstance(refused, Failed) and (refused.status, refused.retry_after) == (503, 1)


def test_a_fault_reaches_its_caller_alone_and_the_engine_goes_on() -> None:
    async def scenario() -> None:
        engine = PredictionEngine("model/fake@1", Doubler(), max_batch=4, max_waiting=4)
        good, bad, late = await asyncio.gather(
            ask(engine, "1", 1), ask(engine, "2", 5, None), ask(engine, "3", *range(5))
        )
        assert labels(good) == ["2"] and len(labels(late)) == 5
        assert bad[-1] == Failed(500, "the model failed on inputs[1]", "engine_fault", "inputs")
        assert engine.stats().running + engine.stats().waiting == 0
        engine.check()
        engine.close()

    asyncio.run(scenario())


def test_faults_in_a_row_are_told_to_the_health_check_until_an_answer_comes() -> None:
    async def scenario() -> None:
        engine = PredictionEngine("model/fake@1", Doubler(), max_batch=4, max_waiting=4)
        for _ in range(3):
            assert isinstance((await ask(engine, "1", None))[-1], Failed)
        with pytest.raises(ServingError, match="3 batches in a row"):
            engine.check()
        assert labels(await ask(engine, "2", 4)) == ["8"]
        engine.check()
        engine.close()

    asyncio.run(scenario())


def test_inputs_of_a_caller_who_left_are_not_computed() -> None:
    async def scenario() -> None:
        predictor = Doubler()
        predictor.gate.clear()
        engine = PredictionEngine("model/fake@1", predictor, max_batch=1, max_waiting=4)
        first = asyncio.create_task(ask(engine, "1", 1))
        await asyncio.sleep(0.01)
        leaving = asyncio.create_task(ask(engine, "2", 2))
        await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        predictor.gate.set()
        assert labels(await first) == ["2"]
        assert predictor.batches == [1]
        engine.close()

    asyncio.run(scenario())
