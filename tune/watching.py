"""What the driver does while Ray Tune runs: keep the ledger, show a table, end it in time.

Ray Tune pickles both classes into the study's folder, to have them again when it is restored:
they hold plain data, and find the rest in the store.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray.tune import Callback, Stopper

from cluster import loading, progress
from cluster.config import RunConfig
from cluster.errors import StorageError
from cluster.storage import Artifact, Store
from pipelines.training import elastic
from tune import ledger
from tune.ledger import Attempt, Ledger, State, shown
from tune.objective import Plan, checkpoint_name

LOST = "lost"
SHOW_SECONDS = 1.0
MOST_SHOWN = 20


class Watch(Callback):
    """Writes the ledger at each report."""

    def __init__(self, plan: Plan, roles: tuple[str, ...]) -> None:
        self._plan, self._roles = plan, roles
        self._table: Any = None
        self._compared = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_plan": self._plan, "_roles": self._roles, "_table": None, "_compared": False}

    @property
    def _ledger(self) -> Ledger:
        return Ledger(Store(self._plan.root), self._plan.study)

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
        """Ray notes its trials every few seconds, the ledger at once: after a kill it may know some
        that Ray does not."""
        if self._compared:
            return
        self._compared = True
        known = {trial.trial_id for trial in trials}
        for attempt in self._ledger.attempts():
            if attempt.role in self._roles and attempt.trial not in known:
                self._ledger.write(replace(attempt, role=LOST, state="ended"))

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if self._ledger.read(trial.trial_id) is None:
            self._ledger.write(begun(trial.trial_id, trial.config))
        self._show()

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        found = self._ledger.read(trial.trial_id) or begun(trial.trial_id, trial.config)
        if "step" in result:
            self._ledger.write(found.reported(result, trial.config["values"]))
        self._show()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        said = str((trial.last_result or {}).get("state", "running"))
        states: dict[str, State] = {"done": "done", "failed": "failed"}
        self._close(trial, states.get(said, "ended"))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._close(trial, "failed")

    def on_experiment_end(self, trials: Any, **info: Any) -> None:
        if self._table is not None:
            self._table.end(self._ledger.attempts)

    def _close(self, trial: Any, state: State) -> None:
        found = self._ledger.read(trial.trial_id) or begun(trial.trial_id, trial.config)
        reason = found.reason or ("its process died" if state == "failed" else "")
        found = replace(found, state=state, reason=reason)
        self._ledger.write(found)
        if not self._plan.keep and state == "done":  # else its workers may still be ending
            drop_checkpoints(self._plan, trial.trial_id)
        if self._table is None or not self._table.live:
            progress.say(f"tune: {line(found, _config(self._plan))}")

    def _show(self) -> None:
        if self._table is None:
            self._table = Table(_config(self._plan))
        self._table.show(self._ledger.attempts)


class Budget(Stopper):
    """Ends the study once one of its budgets is used up."""

    def __init__(self, plan: Plan, workers: int) -> None:
        self._plan, self._workers, self._over = plan, workers, ""

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        settings = _config(self._plan).tune
        if settings.seconds or settings.tokens or settings.money:
            self._over = self._used_up(settings, trial_id, result)
        return bool(self._over)

    def stop_all(self) -> bool:
        return bool(self._over)

    def _used_up(self, settings: Any, trial: str, result: Mapping[str, Any]) -> str:
        """Name of the budget that is; the report in hand is not in the ledger yet."""
        book = Ledger(Store(self._plan.root), self._plan.study)
        attempts = [
            a.reported(result, a.values) if a.trial == trial and "step" in result else a
            for a in book.attempts()
            if a.role in ("search", LOST)
        ]
        used = ledger.spent(settings, attempts, self._workers)
        return next((key for key, share in used.items() if share >= 1), "")


class Table:
    """The trials on a terminal, live."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._shown = config, 0.0
        self._live: Any = None
        if progress.console().is_terminal:
            from rich.live import Live

            self._live = Live(console=progress.console(), auto_refresh=False)
            self._live.start()

    @property
    def live(self) -> bool:
        return self._live is not None

    def show(self, attempts: Any) -> None:
        if self._live is not None and time.monotonic() - self._shown >= SHOW_SECONDS:
            self._shown = time.monotonic()
            self._draw(attempts)

    def end(self, attempts: Any) -> None:
        """Leave it there as it is at last."""
        if self._live is not None:
            self._draw(attempts)
            self._live.stop()

    def _draw(self, attempts: Any) -> None:
        there = [attempt for attempt in attempts() if attempt.role != LOST]
        self._live.update(drawn(self._config, there), refresh=True)


def drawn(config: RunConfig, attempts: list[Attempt]) -> Any:
    """A table of the newest trials."""
    from rich.table import Table as Drawn
    from rich.text import Text

    objectives = config.tune.objectives
    title = f"{config.name}: {len(attempts)} trials"
    table = Drawn(title=title)
    for name in ("trial", "state", "step", *objectives, *config.tune.space):
        table.add_column(name, overflow="fold")
    for attempt in attempts[-MOST_SHOWN:]:
        cells = [attempt.trial, attempt.state, f"{attempt.last.get('step', 0):.0f}"]
        cells += [f"{attempt.last.get(metric, float('nan')):.4g}" for metric in objectives]
        cells += [shown(attempt.values.get(key, "")) for key in config.tune.space]
        table.add_row(*map(Text, cells))
    return table


def line(attempt: Attempt, config: RunConfig) -> str:
    """`3f2a done at step 40: heldout_loss 2.31 (train.learning_rate 0.0031)`."""
    figures = ", ".join(f"{m} {attempt.figure(m):.4g}" for m in config.tune.objectives)
    values = ", ".join(f"{key} {shown(value)}" for key, value in attempt.values.items())
    outcome = attempt.reason if attempt.state == "failed" else figures
    step = f"{attempt.last.get('step', 0):.0f}"
    return f"{attempt.trial} {attempt.state} at step {step}: {outcome} ({values})"


def begun(trial: str, chosen: Mapping[str, Any]) -> Attempt:
    role = str(chosen.get("role", "search"))
    return Attempt(trial, role, int(chosen["seed"]), dict(chosen["values"]), time.time())


def drop_checkpoints(plan: Plan, trial: str) -> None:
    """What nobody goes on from, finished or not."""
    store, name = Store(plan.root), checkpoint_name(plan, trial)
    try:
        for kind in ("checkpoint", elastic.KIND):
            for found in list(store.survey(kind, name)):
                if isinstance(found, Artifact):
                    store.delete(found)
                else:
                    store.sweep(kind, name, found.version)
    except StorageError as error:
        progress.say(f"tune: checkpoints of {trial} stay: {error}")


def trial_folder(trial: Any) -> str:
    """Of Ray's own notes; by itself it would spell out all values."""
    return str(trial.trial_id)


def _config(plan: Plan) -> RunConfig:
    return loading.validate(dict(plan.config))
