"""STAGE tune: search for settings over runs of pretrain, confirm the best, hand it on as a recipe.

Every trial is the pretraining stage itself on the same rows in the same order. The trials are
compared on one half of the held-out rows; the winner is then trained again, beside the recipe as it
is, from several seeds, and both are measured on the other half.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster import doctor, lease, progress
from cluster.config import RunConfig
from cluster.errors import CapacityError, ConfigError, TrainingError
from cluster.session import Session, check_capacity, open_store, session
from cluster.stages import BY_VERB, StageResult, fingerprint, required, resolved
from cluster.storage import Artifact, Store
from pipelines.data.corpus import Corpus
from pipelines.training import heldout
from tune import ledger, outcome, report, space, tracking
from tune.ledger import Attempt, Ledger
from tune.space import Space

REPORTS = 10
"""Of a trial, where the recipe does not say how often."""
RETRIES = 1
"""Times that a trial whose own process died is begun again; its workers have their own."""


@dataclass(frozen=True)
class Study:
    """What is searched, and by which name its remains are found again."""

    config: RunConfig
    store: Store
    corpus: Artifact
    space: Space
    mark: str

    @property
    def id(self) -> str:
        return f"{self.config.name}-tune-{self.mark[:10]}"

    @property
    def steps(self) -> int:
        """Of a trial, or of each of its folds."""
        train = self.config.train
        return min(train.steps, self.config.tune.steps or train.steps)

    @property
    def all_steps(self) -> int:
        """Of a trial, through all of its folds."""
        return self.steps * max(1, self.config.tune.folds)

    @property
    def every(self) -> int:
        """Steps between two reports of a trial."""
        return min(self.steps, self.config.tune.report_every or max(1, self.steps // REPORTS))

    @property
    def workers(self) -> int:
        """Of a trial; the most, where that is searched."""
        searched = [d.domain for d in self.space.free if d.key == "train.workers"]
        ends = [n for domain in searched for n in domain.points(2) if isinstance(n, int)]
        return max([self.config.train.world_sizes[0], *ends])

    @property
    def book(self) -> Ledger:
        return Ledger(self.store, self.id)

    @property
    def attempts(self) -> list[Attempt]:
        return self.book.attempts()


def check(config: RunConfig) -> None:
    """Refuse what would only come to light after minutes of preparing data.

    Raises:
        ConfigError: naming the key and the cure.
    """
    space.parse(config)
    tune, train = config.tune, config.train
    if train.input == "stream":
        raise ConfigError(
            "tune compares runs over the same rows in the same order, which train.input stream "
            "does not promise: store the corpus"
        )
    if tune.steps > train.steps:
        raise ConfigError(
            f"tune.steps {tune.steps} is more than the run has: train.steps is {train.steps}"
        )
    if tune.gpus_per_worker < 1 and train.world_sizes[-1] > 1:
        raise ConfigError(
            f"tune.gpus_per_worker {tune.gpus_per_worker:g} puts workers of one trial on the same "
            f"GPU, which NCCL refuses: take train.workers=1, not {train.world_sizes[-1]}"
        )


def run(config: RunConfig) -> StageResult:
    """Search, or go on with a search that was stopped.

    Raises:
        CapacityError: if the cluster cannot hold the workers of one trial.
        ClusterError: if its nodes do not fit together.
        TrainingError: if no trial could be trained.
        UsageError: if the space holds nothing that could be, or the corpus nothing to compare on.
    """
    check(config)
    store = open_store(config)
    with lease.held(store, f"{config.name}.tune"):
        study = study_of(config, store)
        with session(config) as joined:
            doctor.before(joined)
            check_capacity(
                joined, workers=study.workers, cpus_per_worker=config.train.threads_per_worker
            )
            _search(_within(study, joined), joined)
            _confirm(study, joined)
        return _result(study)


def study_of(config: RunConfig, store: Store) -> Study:
    corpus = required("tune", store, config)
    heldout.chosen(Corpus(corpus), config.tune.heldout_rows)
    mark = fingerprint(BY_VERB["tune"], config, corpus, {})
    if config.fresh:  # another name is another study
        made = store.versions("study", config.name)
        mark = fingerprint(BY_VERB["tune"], config, corpus, {"again": len(made)})
    return Study(config, store, corpus, space.parse(config), mark)


def _within(study: Study, joined: Session) -> Study:
    """A study that leaves out what would not fit the machines."""
    from tune import fitting

    at_a_time = at_once(study, joined)["max_concurrent_trials"]
    fits = fitting.fits(study.config, Corpus(study.corpus), study.workers, at_a_time)
    return replace(study, space=replace(study.space, fits=fits))


def _search(study: Study, joined: Session) -> None:
    """Trials until they are all tried or the budget is used up."""
    from ray.tune import TuneConfig

    from tune import schedulers

    settings = study.config.tune
    algorithm, number, param_space = chooser(study)
    metric, mode = settings.objective
    tuning = TuneConfig(
        metric=metric,
        mode=mode,
        num_samples=number,
        search_alg=algorithm,
        scheduler=schedulers.scheduler(study.space, study.all_steps, study.every, study.book),
        **at_once(study, joined),
    )
    _fit(study, study.id, tuning, param_space, budget=True)


def chooser(study: Study) -> tuple[Any, int, dict[str, Any]]:
    """What chooses the trials, how many there are, and what Ray Tune is told of them itself."""
    from tune import searchers

    settings, seed = study.config.tune, study.config.seed
    if settings.scheduler == "pbt":  # Ray lets no searcher choose for it
        found = searchers.drawn(study.space, settings.trials)
        return None, 1, _listed([{"values": p, "seed": seed} for p in found])
    if settings.search == "grid":
        listed = searchers.possible(study.space)[: settings.trials]
        return searchers.Listed(listed, seed), len(listed), {}
    searchers.drawn(study.space, 1)  # refuses a space that holds nothing
    return searchers.Asked(study.space, study.all_steps), settings.trials, {}


def _confirm(study: Study, joined: Session) -> None:
    """The winner and the recipe as it is, from several seeds, on rows that nothing was chosen by.

    Raises:
        TrainingError: if there is no winner.
    """
    from ray.tune import TuneConfig

    winner = _winner(study)
    runs = confirmations(study, winner.values)
    if not runs:
        return
    progress.say(f"tune: {len(runs)} runs confirm {winner.trial} beside the recipe as it is")
    metric, mode = study.config.tune.objective
    tuning = TuneConfig(metric=metric, mode=mode, **at_once(study, joined))
    _fit(study, f"{study.id}-confirm", tuning, _listed(runs), budget=False)


def confirmations(study: Study, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs that tell the gain of some values from noise; none where the recipe wants none."""
    more = study.config.tune.confirm_seeds
    sides: dict[str, Mapping[str, Any]] = {"winner": values, "recipe": {}}
    if all(study.space.base[key] == value for key, value in values.items()):
        del sides["recipe"]  # they are the same
    return [
        {"values": dict(side), "seed": study.config.seed + n, "confirm": True, "role": role}
        for n in range(more + 1)
        for role, side in sides.items()
        if more
    ]


def _fit(
    study: Study, name: str, tuning: Any, param_space: dict[str, Any], *, budget: bool
) -> None:
    """One experiment of Ray Tune, from wherever it stands."""
    # Its own handler would take Ctrl-C for the end of the study.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # Its newer output prints a table of its own at any verbosity.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # What is reported goes to our ledger; Ray would write it three times more.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # A kill loses what came since: seconds, where Ray by itself would take up to minutes.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")
    import ray.tune

    from tune.objective import Objective
    from tune.watching import Budget, Watch, drop_checkpoints

    plan = plan_of(study)
    drivers = ray.tune.PlacementGroupFactory([{"memory": 1}])  # a byte: no CPU, and not nothing
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(Objective, plan=plan),
        drivers,
    )
    storage = f"{study.store.base}/.ray"
    place, filesystem = f"{storage}/{name}", study.store.filesystem
    if _was_begun(filesystem, place):
        progress.say(f"tune: going on with {name}")
        tuner = ray.tune.Tuner.restore(
            place, trainable, resume_errored=False, storage_filesystem=filesystem
        )
    else:
        tuner = ray.tune.Tuner(
            trainable,
            param_space=param_space,
            tune_config=tuning,
            run_config=ray.tune.RunConfig(
                name=name,
                storage_path=storage,
                storage_filesystem=filesystem,
                stop=Budget(plan, study.workers) if budget else None,
                failure_config=ray.tune.FailureConfig(max_failures=RETRIES),
                callbacks=[Watch(plan, ("search",) if budget else ("winner", "recipe"))],
                verbose=0,
            ),
        )
    try:
        tuner.fit()
    except ray.tune.TuneError as error:
        reason = str(error.__cause__ or error).strip().splitlines() or ["no reason given"]
        raise TrainingError(f"the search failed: {reason[-1]}") from error
    for attempt in study.attempts:
        if attempt.state == "running":  # the budget ended it with the others
            study.book.write(replace(attempt, state="ended"))
        if not (plan.keep and attempt.role == "search"):
            drop_checkpoints(plan, attempt.trial)
    tracking.tell(study.config, study.store, study.id, study.attempts)


def _was_begun(filesystem: Any, place: str) -> bool:
    """Whether Ray has noted how an experiment stands; its settings alone cannot be gone on from."""
    from pyarrow import fs

    found = filesystem.get_file_info(fs.FileSelector(place, allow_not_found=True))
    names = {info.base_name for info in found}
    return "tuner.pkl" in names and any(name.startswith("experiment_state") for name in names)


def plan_of(study: Study) -> Any:
    from tune.objective import Plan

    config = study.config
    return Plan(
        resolved(config),
        study.store.uri,
        (study.corpus.name, study.corpus.version),
        study.id,
        f"{config.name[:32]}.t{study.mark[:6]}",
        study.steps,
        study.every,
        config.tune.scheduler == "pbt",
    )


def _listed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Exactly these trials, as Ray Tune is told."""
    import ray.tune

    keys = {key for one in runs for key in one}
    whole = [{key: one.get(key) for key in keys} for one in runs]
    chosen = ray.tune.grid_search(list(range(len(whole))))
    return {"number": chosen} | {
        key: ray.tune.sample_from(lambda spec, key=key: whole[spec.config.number][key])
        for key in keys
    }


def at_once(study: Study, joined: Session) -> dict[str, Any]:
    """How many trials, so that none waits for workers that another holds."""
    tune, train = study.config.tune, study.config.train
    if joined.gpus:
        holds = int(joined.gpus / tune.gpus_per_worker + 1e-6) // study.workers
    else:
        holds = joined.cpus // (study.workers * train.threads_per_worker)
    most = min(tune.concurrent, holds) if tune.concurrent else holds
    if tune.scheduler == "pbt" and most < 2:
        raise CapacityError(
            f"tune.scheduler pbt exchanges weights between trials at once and there is room for "
            f"{max(1, most)} of {study.workers} workers: take fewer workers, or asha"
        )
    from tune.watching import trial_folder

    return {
        "max_concurrent_trials": max(1, most),
        "reuse_actors": True,
        "trial_dirname_creator": trial_folder,
    }


def _winner(study: Study) -> Attempt:
    metric, mode = study.config.tune.objective
    searched = [a for a in study.attempts if a.role == "search"]
    winner = ledger.best(searched, metric, mode)
    if winner is None:
        reasons = "; ".join(dict.fromkeys(a.reason for a in searched if a.reason))
        raise TrainingError(f"no trial of {study.id} could be trained: {reasons or 'none began'}")
    return winner


def _result(study: Study) -> StageResult:
    """Commit what was found: the recipe, the figures, and a page about them."""
    attempts, winner = study.attempts, _winner(study)
    found = outcome.summary(study.config, attempts, winner, study.every)
    staging = study.store.stage("study", study.config.name)
    try:
        files = [
            staging.write("best.yaml", outcome.best_recipe(study.config, found).encode()),
            staging.write_json("outcome.json", found.tree()),
            staging.write_json("trials.json", outcome.plain(attempts)),
            staging.write("report.html", report.page(study.space, attempts, found)),
        ]
        artifact = staging.commit(
            files,
            fingerprint=fingerprint(BY_VERB["tune"], study.config, study.corpus, {}),
            config=resolved(study.config),
            parents=(study.corpus,),
            metrics=found.figures,
            detail={"overrides": dict(found.values), "study": study.id, "headline": found.headline},
        )
    except BaseException:
        staging.abandon()
        raise
    tracking.tell(study.config, study.store, study.id, attempts, found.figures)
    progress.say(found.text)
    progress.say(f"tune: `heliostat pretrain {artifact.uri}/best.yaml` trains the winner")
    return StageResult(artifact, found.headline, found.figures)
