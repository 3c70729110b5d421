"""Dynamic batching for models that answer at once (classifiers).

What arrives while one batch is computed makes up the next one: nothing waits for company, and
under load the batches grow by themselves.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cluster.errors import ServingError
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

log = logging.getLogger(__name__)
FAULTS = 3
"""Batches that fail one after the other until the engine counts as broken. A single one may be an
input that the predictor cannot take: it must not cost a replica."""
Answer = dict[str, Any] | Exception


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
        self._faults = 0
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
        if self._faults >= FAULTS:
            raise ServingError(f"{self.model} failed on {self._faults} batches in a row")

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
            answers = await loop.run_in_executor(self._thread, self._predict, values)
            failed = [answer for answer in answers if _is_fault(answer)]
            self._faults = self._faults + 1 if failed else 0
            for item, answer in zip(batch, answers, strict=True):
                if not item.answer.done():
                    item.answer.set_result(answer)
        self._worker, self._running = None, 0

    def _predict(self, values: Sequence[Any]) -> Sequence[Answer]:
        """One bad input must not fail its neighbours in the batch: then each goes alone."""
        try:
            return self._predictor.predict(values)
        except ValueError as error:
            refused: Exception = error
        except Exception as fault:
            # The thread's border: the fault goes to its caller, and to the health check.
            log.exception("%s failed on a batch of %d", self.model, len(values))
            refused = fault
        if len(values) == 1:
            return [refused]
        return [self._predict([value])[0] for value in values]


def _is_fault(answer: Answer) -> bool:
    return isinstance(answer, Exception) and not isinstance(answer, ValueError)


def _outcome(answers: Sequence[Answer]) -> Event:
    for index, answer in enumerate(answers):
        if _is_fault(answer):
            return Failed(500, f"the model failed on inputs[{index}]", "engine_fault", "inputs")
        if isinstance(answer, ValueError):
            # It was asked alone, as input 0.
            reason = str(answer).removeprefix("input 0: ")
            return Failed(400, f"inputs[{index}]: {reason}", param="inputs")
    return Predicted(tuple(answer for answer in answers if isinstance(answer, dict)))
