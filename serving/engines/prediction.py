"""Dynamic batching for models that answer at once (classifiers).

What arrives while one batch is computed makes up the next one: nothing waits for company, and
under load the batches grow by themselves.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipelines.families.base import Predictor
from serving.engines.base import (
    OVERLOADED,
    Event,
    Failed,
    Predicted,
    PredictionRequest,
    Started,
    Stats,
)

Answer = dict[str, Any] | ValueError


@dataclass(frozen=True)
class _Item:
    request: str
    value: Any
    answer: asyncio.Future[Answer]


class PredictionEngine:
    """See `engines.base.Engine`. Belongs to one event loop; the model runs on its own thread.

    Args:
        max_batch: inputs that the model sees at once.
        max_waiting: inputs beyond one batch that wait before more are refused.
    """

    def __init__(
        self, model: str, predictor: Predictor, *, max_batch: int, max_waiting: int
    ) -> None:
        self.model = model
        self._predictor = predictor
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._pending: deque[_Item] = deque()
        self._running = 0
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prediction")

    async def submit(self, request: PredictionRequest) -> AsyncIterator[Event]:
        if self._running + len(self._pending) + len(request.inputs) > (
            self._max_batch + self._max_waiting
        ):
            yield OVERLOADED
            return
        loop = asyncio.get_running_loop()
        items = [_Item(request.id, value, loop.create_future()) for value in request.inputs]
        self._pending.extend(items)
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        try:
            yield Started(self.model)
            answers = [await item.answer for item in items]
            yield _outcome(answers)
        finally:
            self.cancel(request.id)

    def cancel(self, request_id: str) -> None:
        self._pending = deque(item for item in self._pending if item.request != request_id)

    def stats(self) -> Stats:
        return Stats(self._running, len(self._pending))

    def check(self) -> None:
        """A predictor that fails answers with an error each time; the engine itself goes on."""

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._pending:
            batch = [
                self._pending.popleft() for _ in range(min(self._max_batch, len(self._pending)))
            ]
            self._running = len(batch)
            values = [item.value for item in batch]
            try:
                answers = await loop.run_in_executor(self._thread, self._predict, values)
            except Exception as fault:
                for item in batch:
                    _resolve(item.answer, fault)
                self._worker, self._running = None, 0
                raise
            for item, answer in zip(batch, answers, strict=True):
                _resolve(item.answer, answer)
        self._worker, self._running = None, 0

    def _predict(self, values: Sequence[Any]) -> Sequence[Answer]:
        """One bad input must not fail its neighbours in the batch: then each goes alone."""
        try:
            return self._predictor.predict(values)
        except ValueError as error:
            if len(values) == 1:
                return [error]
            return [self._predict([value])[0] for value in values]


def _resolve(future: asyncio.Future[Answer], outcome: Answer | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, dict | ValueError):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)


def _outcome(answers: Sequence[Answer]) -> Event:
    for index, answer in enumerate(answers):
        if isinstance(answer, ValueError):
            # It was asked alone, as input 0.
            reason = str(answer).removeprefix("input 0: ")
            return Failed(400, f"inputs[{index}]: {reason}", param="inputs")
    return Predicted(tuple(answer for answer in answers if isinstance(answer, dict)))
