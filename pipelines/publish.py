"""STAGE publish: write Hugging Face layout, open it again, register it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import loading, progress
from cluster.config import RunConfig
from cluster.errors import ArtifactError, HeliostatError
from cluster.placement import Room, run_on_one_node
from cluster.registry import Registry, registry_uri
from cluster.session import open_store, session
from cluster.stages import (
    BY_VERB,
    StageResult,
    fingerprint,
    parent,
    relevant,
    required,
    resolved,
)
from cluster.storage import Artifact, FileEntry, Staging, Store
from cluster.tracking import Tracking
from pipelines.evaluation.trained import Trained

if TYPE_CHECKING:
    import torch

PARITY_PROMPTS = ("The ", "一")
"""Continued greedily beside `evaluate.prompt`: a server that answers otherwise is broken."""
PARITY_TOKENS = 16
PARITY_LOGITS = 8
"""Largest logits after a prompt that are kept."""
LOGIT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Written:
    """What the task sends back."""

    files: list[FileEntry]
    detail: dict[str, Any]


def check(config: RunConfig) -> None:
    """Refuse before training what would fail after it."""
    registry_uri(open_store(config), config)


def run(config: RunConfig) -> StageResult:
    """Publish the newest evaluated checkpoint.

    Raises:
        UsageError: if nothing was evaluated, or `registry.uri` is missing where it is needed.
        HeliostatError: if the folder does not open to the same model, or the registry refuses;
            nothing is published then.
    """
    store = open_store(config)
    registry = Registry(registry_uri(store, config))
    evaluation = required("publish", store, config)
    trained = Trained.open(parent(evaluation, "checkpoint"), config)
    artifact = _write(store, config, evaluation, trained)
    with _registered_or_deleted(artifact):
        _log_run(registry.uri, config, evaluation, trained)
        number = registry.register(artifact, config.publish.alias)
    progress.say(
        f"publish: {artifact.uri} is version {number} of {artifact.name} in {registry.uri}, "
        f"alias {config.publish.alias}"
    )
    headline = f"{artifact.name}@{artifact.version}, {config.publish.alias}"
    return StageResult(artifact, headline, artifact.manifest.metrics)


def rebuild(config: RunConfig) -> list[str]:
    """Make MLflow's entries of a storage root again, from the manifests: every model with its
    alias, and the figures of the run behind it. What is there already stays.

    An alias goes to the newest model that was published under it.

    Returns:
        A line for each model.

    Raises:
        HeliostatError: if the registry cannot be reached or refuses.
    """
    store = open_store(config)
    registry = Registry(registry_uri(store, config))
    return [_indexed(model, registry) for model in store.all("model")]


def _indexed(model: Artifact, registry: Registry) -> str:
    config = loading.validate(dict(model.manifest.config))
    alias = config.publish.alias
    line = f"{model.id} is version {registry.register(model, alias)}, alias {alias}"
    try:
        evaluation = parent(model, "evaluation")
        trained = Trained.open(parent(evaluation, "checkpoint"), config)
    except ArtifactError as error:
        return f"{line}; its run stays unknown: {error}"
    _log_run(registry.uri, config, evaluation, trained)
    return line


def write(
    trained: Trained, evaluation: Artifact, config: RunConfig, folder: Path
) -> dict[str, Any]:
    """Fill an empty folder, and open it again the way any user would.

    Returns:
        The model artifact's detail.

    Raises:
        HeliostatError: if the folder is not safe to open, or opens to another model.
    """
    from pipelines.families import huggingface

    family, model = trained.family, trained.model()
    with trained.corpus.artifact.local("encoder/") as encoder_folder:
        fields = family.export(trained.config, model, encoder_folder, folder)
    card = _card(trained, evaluation, config, fields, sum(p.numel() for p in model.parameters()))
    (folder / "README.md").write_text(card, encoding="utf-8")
    huggingface.check_layout(folder)
    reopened = family.reopen(folder)
    check_same(trained, model, reopened)
    hugging: Any = reopened
    return {
        "family": family.name,
        "context_length": getattr(hugging.config, "max_position_embeddings", None),
        "prompts": (
            parity_prompts(reopened, folder, (config.evaluate.prompt, *PARITY_PROMPTS))
            if hugging.can_generate()
            else []
        ),
        "facts": trained.corpus.facts,
    }


def check_same(trained: Trained, model: torch.nn.Module, reopened: torch.nn.Module) -> None:
    """Compare the logits of a held-out batch.

    Raises:
        HeliostatError: if they differ by more than rounding.
    """
    import torch

    batch = next(trained.batches())
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.inference_mode():
        apart = float((model(**inputs).logits - reopened(**inputs).logits).abs().max())
    if not apart <= LOGIT_TOLERANCE:
        raise HeliostatError(
            f"the published folder opens to another model: logits differ by {apart:.2e}, at most "
            f"{LOGIT_TOLERANCE:.0e} is rounding; nothing was published"
        )


def parity_prompts(
    model: torch.nn.Module, folder: Path, prompts: Iterable[str]
) -> list[dict[str, Any]]:
    """Prompts with the tokens that the published folder continues them with, and the largest
    logits after each as [token, logit]. Replicas replay them before they answer."""
    from transformers import AutoTokenizer

    from pipelines.families.huggingface import greedy, next_logits

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    hugging: Any = model
    room = max(1, int(hugging.config.max_position_embeddings) // 2)
    recorded = []
    for prompt in prompts:
        tokens = list(tokenizer(prompt)["input_ids"])[-room:]
        if tokens:
            answer = greedy(model, tokens, min(PARITY_TOKENS, room))
            logits = next_logits(model, tokens, PARITY_LOGITS)
            recorded.append(
                {"prompt": prompt, "tokens": tokens, "greedy": answer, "logits": logits}
            )
    return recorded


def _write(store: Store, config: RunConfig, evaluation: Artifact, trained: Trained) -> Artifact:
    staging = store.stage("model", config.name)
    try:
        with session(config), progress.bar("publish", 1, "model") as bar:
            source = (store.uri, evaluation.name, evaluation.version)
            written: Written = run_on_one_node(_task, source, config, staging)
            bar.update(1)
        return staging.commit(
            written.files,
            fingerprint=fingerprint(BY_VERB["publish"], config, evaluation, {}),
            config=resolved(config),
            parents=(evaluation, trained.checkpoint, trained.corpus.artifact),
            metrics=evaluation.manifest.metrics,
            detail=written.detail,
        )
    except BaseException:
        staging.abandon()
        raise


def _task(room: Room, source: tuple[str, str, int], config: RunConfig, staging: Staging) -> Written:
    import torch

    torch.set_num_threads(room.cpus)
    root, name, version = source
    evaluation = Store(root).artifact("evaluation", name, version)
    trained = Trained.open(parent(evaluation, "checkpoint"), config)
    with tempfile.TemporaryDirectory(prefix="heliostat-") as folder:
        detail = write(trained, evaluation, config, Path(folder))
        return Written(staging.copy_tree(Path(folder)), detail)


@contextmanager
def _registered_or_deleted(artifact: Artifact) -> Iterator[None]:
    """A model that the registry does not know must not look published."""
    try:
        yield
    except BaseException:
        artifact.store.delete(artifact)
        raise


def _log_run(uri: str, config: RunConfig, evaluation: Artifact, trained: Trained) -> None:
    """The run of the checkpoint, with what MLflow does not have of it yet."""
    from pipelines.training.checkpoint import read_history

    checkpoint = trained.checkpoint
    tracking = Tracking.of(checkpoint.store, config, checkpoint.manifest.detail["run"], uri)
    tracking.begin(relevant(BY_VERB["pretrain"], resolved(trained.config)))
    tracking.log(read_history(checkpoint))
    metrics = evaluation.manifest.metrics.items()
    tracking.end("FINISHED", {f"heldout_{key}": value for key, value in metrics})


def _card(
    trained: Trained,
    evaluation: Artifact,
    config: RunConfig,
    fields: dict[str, str],
    parameters: int,
) -> str:
    from cluster.version import code_version
    from pipelines.evaluation.card import Card

    corpus = trained.corpus.artifact
    stages = (BY_VERB[verb] for verb in ("prepare", "pretrain"))
    keys: dict[str, Any] = {}
    for stage in stages:
        keys |= relevant(stage, resolved(trained.config))
    return Card(
        name=config.name,
        description=config.description,
        license=config.publish.license,
        fields=fields,
        config=keys,
        parameters=parameters,
        corpus=_counts(corpus.read_json("report.json")),
        sources=trained.config.data.sources,
        metrics=evaluation.manifest.metrics,
        report=_without_title(evaluation.read_bytes("report.md").decode()),
        ancestors=[(a.id, _digest(a)) for a in (evaluation, trained.checkpoint, corpus)],
        code_version=code_version(),
    ).render()


def _counts(report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a corpus report; its shards and what models need are told elsewhere."""
    counts: dict[str, Any] = {}
    for key, value in report.items():
        if isinstance(value, Mapping) and key != "facts":
            counts[key] = _counts(value)
        elif not isinstance(value, Mapping | list):
            counts[key] = value
    return counts


def _without_title(report: str) -> str:
    """From the first section on, and without the pictures, which stay with the evaluation."""
    lines = report[report.index("\n## ") :].splitlines() if "\n## " in report else []
    return "\n".join(line for line in lines if not line.startswith("![")).strip()


def _digest(artifact: Artifact) -> str:
    return hashlib.sha256(artifact.manifest.encode()).hexdigest()
