"""Every override changes what is done: by a row of the table here, or by a test that is named."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import loading
from cluster.config import RunConfig
from cluster.errors import ConfigError
from tests import observed_data as data
from tests import observed_service as service
from tests import observed_training as training
from tests import observed_tuning as tuning

ROOT = Path(__file__).parents[2]
IMAGES = "image_classifier"


@dataclass(frozen=True)
class Case:
    """A key, another value of it, and what shows the difference."""

    key: str
    value: str
    observe: Callable[[RunConfig], Any]
    given: tuple[str, ...] = ()
    """Overrides on both sides."""
    family: str = "causal_lm"


SHORT = ("data.sequence_length=32", "model.hidden_size=32", "model.layers=1")
MASKED = "data.tokenizer.special_tokens=['<|mask|>']"
SMALL = ("data.vocab_size=300",)
NEAR = (*SMALL, "data.dedup.near=true")
LINES = (*SMALL, "data.dedup.lines=5", "data.dedup.unit_characters=20")
SMALL_GRAMS = (*SMALL, "data.decontaminate.ngram=8")
AGAINST = (*SMALL_GRAMS, "data.decontaminate.sources=[tests]")
SPREAD = (*SMALL, "data.partition_bytes=6000", "data.row_group_rows=8", "data.sequence_length=16")
FEW = (*SHORT, "train.global_batch=8", "train.warmup_steps=1")
LOOP = (*FEW, "train.steps=30", "train.checkpoint_every=8", "train.keep_checkpoints=9")
ONE_STEP = (*FEW, "train.steps=1", "train.warmup_steps=0")
STAGE_3 = (*SHORT, "train.zero_stage=3")
ON_DISK = (*STAGE_3, "train.offload_optimizer=nvme", "train.nvme_path=/disk")
FP16 = (*STAGE_3, "train.precision=fp16")
FOLLOWING = ("serve.replicas=[1, 3]",)
RATE = "train.learning_rate: 'loguniform(1e-3, 1e-1)'"
SEARCH = (*FEW, f"tune.space={{{RATE}}}", "train.steps=200")
PBT = (*SEARCH, "tune.search=random", "tune.scheduler=pbt")
MONEY = (*SEARCH, "tune.money=3", "tune.price_per_hour=2")
SAMPLES = ("evaluate.sample_tokens=8",)
SMALL_IMAGES = ("data.image_size=8", "data.heldout_fraction=0.3")
PLAIN_IMAGES = ("data.shift=0", "data.rotate=0")

CASES = (
    Case("name", "other", data.place),
    Case("storage.root", "elsewhere", data.place),
    Case("fresh", "true", data.decision),
    Case("family", IMAGES, data.family),
    Case("description", "定日镜。", service.card),
    Case("seed", "7", data.splits, SMALL),
    Case("seed", "7", data.loss, SHORT),
    Case("seed", "7", training.batches, FEW),
    Case("ray.address", "10.0.0.1:6379", data.ray_init),
    Case("ray.cpus", "77", data.ray_init),
    Case("ray.grows_to", "{GPU: 64}", data.growth),
    Case("prepare.tasks", "3", data.ray_data_tasks, SMALL),
    Case("prepare.labels", "{role: data}", data.ray_data_tasks, SMALL),
    Case("prepare.labels", "{role: data}", training.launch, (*FEW, "train.input=stream")),
    # data
    Case("data.sources", "[docs, more]", data.counts, SMALL),
    Case("data.columns", "{docs: {text: body}}", data.texts_of_a_table, SMALL),
    Case("data.columns", "{'*': {text: body}}", data.texts_of_a_table, SMALL),
    Case("data.encrypt", "true", data.encryption, SMALL),
    Case("data.lines", "[docs]", data.counts, (*SMALL, "data.min_characters=1")),
    Case("data.heldout_fraction", "0.5", data.splits, SMALL),
    Case("data.partition_bytes", "9000", data.row_groups, SPREAD),
    Case("data.row_group_rows", "4", data.row_groups, SPREAD),
    Case("data.min_characters", "200", data.counts, SMALL),
    Case("data.max_characters", "200", data.counts, SMALL),
    Case("data.cleaning", "[length: {min: 200}]", data.counts, SMALL),
    Case("data.privacy.apply", "never", data.personal, SMALL),
    Case("data.privacy.types", "[email]", data.personal, SMALL),
    Case("data.privacy.style", "plain", data.personal, SMALL),
    Case("data.privacy.phone_regions", "[FR]", data.personal, SMALL),
    Case("data.privacy.ner", "tests.observed_data:wang", data.personal, SMALL),
    Case("data.dedup.near", "true", data.near, SMALL),
    Case("data.dedup.ngram", "2", data.near, NEAR),
    Case("data.dedup.permutations", "16", data.near, NEAR),
    Case("data.dedup.bands", "2", data.near, NEAR),
    Case("data.dedup.threshold", "0.95", data.near, NEAR),
    Case("data.dedup.lines", "2", data.lines, LINES),
    Case("data.dedup.unit", "paragraph", data.lines, LINES),
    Case("data.dedup.unit_characters", "25", data.lines, LINES),
    Case("data.decontaminate.sources", "[tests]", data.contamination, SMALL_GRAMS),
    Case("data.decontaminate.ngram", "50", data.contamination, AGAINST),
    Case("data.decontaminate.action", "report", data.contamination, AGAINST),
    Case("data.vocab_size", "310", data.tokenizer, SMALL),
    Case("data.tokenizer_bytes", "300", data.tokenizer, SMALL),
    Case("data.tokenizer.model", "unigram", data.tokenizer, SMALL),
    Case("data.tokenizer.path", "given", data.tokenizer, SMALL),
    Case("data.tokenizer.special_tokens", "['<|mask|>']", data.tokenizer, SMALL),
    Case("data.sequence_length", "24", data.row_width, SPREAD),
    Case("data.packing", "best_fit", data.rows, SPREAD),
    Case("data.image_size", "12", data.pictures, SMALL_IMAGES, IMAGES),
    Case("data.channels", "3", data.pictures, SMALL_IMAGES, IMAGES),
    Case("data.shift", "0.3", data.augmented, PLAIN_IMAGES, IMAGES),
    Case("data.rotate", "45", data.augmented, PLAIN_IMAGES, IMAGES),
    # model
    Case("model.hidden_size", "64", data.shapes, SHORT),
    Case("model.layers", "2", data.shapes, SHORT),
    Case("model.heads", "8", data.loss, SHORT),
    Case("model.kv_heads", "2", data.shapes, SHORT),
    Case("model.intermediate_size", "64", data.shapes, SHORT),
    Case("model.rope_theta", "100", data.loss, SHORT),
    Case("model.initializer_range", "0.1", data.spread, SHORT),
    Case("model.tie_embeddings", "false", data.shapes, SHORT),
    Case("model.document_masking", "true", data.loss, SHORT),
    Case("model.embedding_size", "8", data.shapes, (), IMAGES),
    Case("model.hidden_sizes", "[32, 48]", data.shapes, (), IMAGES),
    Case("model.depths", "[1, 2]", data.shapes, (), IMAGES),
    Case("model.layer_type", "bottleneck", data.shapes, (), IMAGES),
    Case("model.downsample_in_first_stage", "true", data.strides, (), IMAGES),
    # train: numbers
    Case("train.steps", "80", training.learning_rates),
    Case("train.steps", "40", training.run_end, LOOP),
    Case("train.learning_rate", "0.1", training.learning_rates),
    Case("train.warmup_steps", "20", training.learning_rates),
    Case("train.schedule", "linear", training.learning_rates),
    Case("train.final_learning_rate", "0.5", training.learning_rates, ("train.steps=90",)),
    Case("train.beta1", "0.5", training.optimizer_groups, SHORT),
    Case("train.beta2", "0.5", training.optimizer_groups, SHORT),
    Case("train.epsilon", "1e-4", training.optimizer_groups, SHORT),
    Case("train.weight_decay", "0.5", training.optimizer_groups, SHORT),
    Case("train.gradient_clip", "0.5", training.deepspeed_settings, SHORT),
    Case("train.precision", "bf16", training.deepspeed_settings, (*SHORT, "train.zero_stage=2")),
    Case("train.shuffle_window", "2", training.batches, FEW),
    Case("train.mix", "{docs: 0.5}", training.batches, FEW),
    Case("train.global_batch", "16", training.batches, FEW),
    Case("train.micro_batch", "2", training.batches, FEW),
    Case("train.micro_batch", "2", training.deepspeed_settings, FEW),
    Case("train.augment.delete", "0.3", data.changed_rows, SHORT),
    Case("train.augment.swap", "0.3", data.changed_rows, SHORT),
    Case("train.augment.mask", "0.3", data.changed_rows, (*SHORT, MASKED)),
    Case("train.augment.replace", "0.3", data.changed_rows, SHORT),
    Case("train.augment.noise", "0.3", data.changed_rows, SHORT),
    # train: where and how
    Case("train.input", "stream", training.launch, FEW),
    Case("train.stream_bytes", "5000000", training.launch, (*FEW, "train.input=stream")),
    Case("train.workers", "4", training.launch, FEW),
    Case("train.threads_per_worker", "3", training.launch, FEW),
    Case("train.labels", "{role: gpu}", training.launch, FEW),
    Case("train.labels", "{ray.io/accelerator-type: H200}", training.launch, FEW),
    Case("train.max_failures", "7", training.launch, FEW),
    Case("train.zero_stage", "3", training.deepspeed_settings, SHORT),
    Case("train.offload_optimizer", "cpu", training.deepspeed_settings, SHORT),
    Case("train.offload_parameters", "cpu", training.deepspeed_settings, STAGE_3),
    Case("train.activation_checkpointing", "true", data.saved_for_backward, SHORT),
    Case("train.loss_chunk", "8", data.saved_for_backward, SHORT),
    Case("train.compile", "true", training.compiles, SHORT),
    # train: checkpoints and faults
    Case("train.checkpoint_every", "5", training.run_left, LOOP),
    Case("train.keep_checkpoints", "1", training.run_left, LOOP),
    Case("train.keep_best", "1", training.run_left, (*LOOP, "train.keep_checkpoints=1")),
    Case("train.save_timeout_seconds", "0.05", training.run_end, ONE_STEP),
    Case("train.max_skipped", "2", training.run_end, LOOP),
    Case("train.on_spike", "rewind", training.run_events, LOOP),
    Case("train.on_spike", "stop", training.run_end, LOOP),
    Case("train.spike_deviations", "0", training.run_events, LOOP),
    Case("train.spike_steps", "1", training.run_events, LOOP),
    Case("train.hang_seconds", "60", training.replaced_workers, FEW),
    Case("train.grace_seconds", "0", training.committed_after_interrupt, FEW),
    Case("train.heldout_every", "20", tuning.looks, LOOP),
    Case("train.heldout_rows", "3", tuning.looks, (*LOOP, "train.heldout_every=20")),
    # tune
    Case("tune.enabled", "true", tuning.stages, SEARCH),
    Case("tune.space", "{model.layers: [1, 2]}", tuning.points, SEARCH),
    Case("tune.space", f"{{{RATE}, model.layers: [1, 2]}}", tuning.chosen, SEARCH),
    Case(
        "tune.objectives",
        "{loss: min, predictions_per_second: max}",
        tuning.directions,
        (*SEARCH, "tune.scheduler=none"),
    ),
    Case("tune.search", "grid", tuning.chosen, SEARCH),
    Case("tune.search", "random", tuning.chosen, SEARCH),
    Case("tune.grid_points", "4", tuning.points, SEARCH),
    Case("tune.scheduler", "median", tuning.ends, SEARCH),
    Case("tune.scheduler", "pbt", tuning.ends, (*SEARCH, "tune.search=random")),
    Case("tune.trials", "3", tuning.chosen, SEARCH),
    Case("tune.steps", "50", tuning.trials, SEARCH),
    Case("tune.report_every", "7", tuning.trials, SEARCH),
    Case("tune.heldout_rows", "3", tuning.trials, SEARCH),
    Case("tune.grace", "0.5", tuning.ends, SEARCH),
    Case("tune.reduction", "2", tuning.ends, SEARCH),
    Case("tune.perturb_every", "33", tuning.ends, PBT),
    Case("tune.concurrent", "1", tuning.at_once, SEARCH),
    Case("tune.gpus_per_worker", "0.5", tuning.at_once, (*SEARCH, "train.workers=1")),
    Case("tune.gpus_per_worker", "0.5", tuning.resources, (*SEARCH, "train.workers=1")),
    Case("tune.seconds", "100", tuning.budget, SEARCH),
    Case("tune.tokens", "1000", tuning.budget, SEARCH),
    Case("tune.money", "5", tuning.budget, MONEY),
    Case("tune.price_per_hour", "5", tuning.budget, MONEY),
    Case("tune.confirm_seeds", "3", tuning.confirmed, SEARCH),
    Case("tune.folds", "3", tuning.trials, SEARCH),
    # evaluate, publish
    Case("evaluate.max_rows", "2", service.metrics, SAMPLES),
    Case("evaluate.batch", "2", service.measured_at_once, SAMPLES),
    Case("evaluate.prompt", "定日镜", service.report, SAMPLES),
    Case("evaluate.sample_tokens", "4", service.report, SAMPLES),
    Case("evaluate.temperature", "3", service.report, SAMPLES),
    Case("publish.alias", "better", service.registered),
    Case("publish.license", "apache-2.0", service.card),
    Case("registry.uri", "sqlite:///root/other.db", service.registered),
    # serve
    Case("serve.host", "0.0.0.0", service.http),
    Case("serve.port", "9000", service.http),
    Case("serve.wait", "false", service.stays),
    Case("serve.models", "[demo,other@1]", service.models_served),
    Case("serve.replicas", "2", service.deployments),
    Case("serve.replicas", "[0, 3]", service.deployments),
    Case("serve.gpus_per_replica", "0.5", service.deployments),
    Case("serve.ingress_replicas", "3", service.deployments),
    Case("serve.upscale_seconds", "9", service.deployments, FOLLOWING),
    Case("serve.downscale_seconds", "9", service.deployments, FOLLOWING),
    Case("serve.target_load", "0.9", service.deployments, FOLLOWING),
    Case("serve.target_tokens", "900", service.deployments, FOLLOWING),
    Case("serve.max_surge_percent", "30", service.deployments),
    Case("serve.max_body_bytes", "2000", service.long_body),
    Case("serve.requests_per_minute", "7", service.quota),
    Case("serve.tokens_per_minute", "7", service.quota),
    Case("serve.concurrent_per_key", "7", service.quota),
    Case("serve.haproxy", "false", service.proxy),
    Case("serve.threads_per_replica", "2", service.threads),
    Case("serve.max_concurrent", "3", service.queue),
    Case("serve.max_waiting", "5", service.queue),
    Case("serve.max_tokens", "50", service.longest_answer),
    Case("serve.engine.precision", "int8", service.runner),
    Case("serve.engine.context", "40", service.runner),
    Case("serve.engine.constant_shape", "true", service.runner),
    Case("serve.engine.prefixes", "2", service.runner),
    Case("serve.engine.stream_interval_ms", "0", service.runner),
    Case("serve.deadline_seconds", "0.05", service.answer_in_time),
)

# What they do takes GPUs; without any, it can only be shown that DeepSpeed is told.
GPU_CASES = (
    Case("train.nvme_path", "/other", training.deepspeed_settings_on_gpus, ON_DISK),
    Case("train.zero_plus_plus.partition_size", "2", training.deepspeed_settings_on_gpus, STAGE_3),
    Case(
        "train.zero_plus_plus.quantized_weights", "true", training.deepspeed_settings_on_gpus, FP16
    ),
    Case(
        "train.zero_plus_plus.quantized_gradients",
        "true",
        training.deepspeed_settings_on_gpus,
        FP16,
    ),
)
NEEDS_GPU = {
    "train.nvme_path": "DeepSpeed's disk swapping takes compiled ops and pinned memory of GPUs",
    "train.zero_plus_plus.partition_size": "a second partition of parameters, gathered by NCCL",
    "train.zero_plus_plus.quantized_weights": "CUDA kernels",
    "train.zero_plus_plus.quantized_gradients": "CUDA kernels",
}
ELSEWHERE = {
    "data.kind": "tests/unit/test_overrides.py::test_a_kind_of_another_family_is_refused",
    "model.kind": "tests/unit/test_overrides.py::test_a_kind_of_another_family_is_refused",
}


def recipe(folder: Path, family: str) -> str:
    """Path of the least that a recipe may say, with relative places."""
    path = folder / f"{family}.yaml"
    path.write_text(
        f"name: demo\nfamily: {family}\nstorage: {{root: root}}\ndata: {{sources: [docs]}}\n"
    )
    return str(path)


@pytest.fixture(scope="module")
def known() -> dict[Any, Any]:
    """What was observed without an override, which many cases share."""
    return {}


@pytest.mark.parametrize("case", [*CASES, *GPU_CASES], ids=lambda case: case.key)
def test_an_override_changes_what_is_done(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: dict[Any, Any]
) -> None:
    def at(folder: str, *more: str) -> Any:
        # Places are relative and always the same: else they would tell two runs apart.
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        path = recipe(tmp_path, case.family)
        return case.observe(loading.load(path, [*case.given, *more]))

    place = (case.observe, case.given, case.family)
    if place not in known:
        known[place] = at("first")
        assert at("again") == known[place], "it is not the same twice"
    assert at("other", f"{case.key}={case.value}") != known[place]


@pytest.mark.parametrize(("key", "value"), [("data.kind", "image"), ("model.kind", "resnet")])
def test_a_kind_of_another_family_is_refused(tmp_path: Path, key: str, value: str) -> None:
    """It follows from the family."""
    path = recipe(tmp_path, "causal_lm")
    with pytest.raises(ConfigError, match=f"family causal_lm needs {key} .*, not {value}"):
        loading.load(path, [f"{key}={value}"])


def test_no_key_is_left_out() -> None:
    shown = {case.key for case in CASES}
    assert {case.key for case in GPU_CASES} == set(NEEDS_GPU)
    groups = (shown, set(ELSEWHERE), set(NEEDS_GPU))
    assert sorted(key for group in groups for key in group) == sorted(set(loading.dotted_keys()))


@pytest.mark.parametrize("key", ELSEWHERE)
def test_what_is_shown_elsewhere_is_there(key: str) -> None:
    path, _, test = ELSEWHERE[key].partition("::")
    text = (ROOT / path).read_text("utf-8")
    assert f"def {test}(" in text and key.rpartition(".")[2] in text
