import pytest

from cluster import loading
from cluster.config import TrainSection
from cluster.errors import ConfigError
from pipelines.training import zero


def section(**changes: object) -> TrainSection:
    return TrainSection.model_validate({"global_batch": 32} | changes)


def settings_of(
    device: zero.Device = "cpu",
    workers: int = 1,
    precision: zero.Precision = "fp32",
    **changes: object,
) -> dict[str, object]:
    return zero.deepspeed_config(
        section(precision=precision, **changes),
        workers=workers,
        precision=precision,
        device=device,
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("workers", "micro"), [(1, 0), (2, 0), (2, 4), (4, 8), (8, 1)])
def test_batch_is_micro_times_accumulation_times_workers(
    stage: int, workers: int, micro: int
) -> None:
    settings: dict = settings_of(workers=workers, zero_stage=stage, micro_batch=micro)
    product = (
        settings["train_micro_batch_size_per_gpu"]
        * settings["gradient_accumulation_steps"]
        * workers
    )
    assert product == settings["train_batch_size"] == 32
    assert settings["zero_optimization"]["stage"] == stage


def test_precision_reaches_the_engine() -> None:
    for precision in ("fp32", "autocast", "bf16", "fp16"):
        settings: dict = settings_of(precision=precision)
        assert settings["bf16"]["enabled"] is (precision == "bf16")
        assert settings["fp16"]["enabled"] is (precision == "fp16")
        assert settings["torch_autocast"]["enabled"] is (precision == "autocast")


def test_auto_precision_follows_device_and_stage() -> None:
    assert zero.precision(section(zero_stage=2), "cuda") == "bf16"
    assert zero.precision(section(zero_stage=0), "cuda") == "autocast"
    assert zero.precision(section(), "cpu") in ("autocast", "fp32")
    assert zero.precision(section(precision="fp32"), "cuda") == "fp32"


def test_deepspeed_builds_no_optimizer_of_its_own() -> None:
    """Its own ones compile at start; ours is torch's."""
    settings = settings_of(workers=2)
    assert "optimizer" not in settings and "scheduler" not in settings


def test_offload_goes_where_it_is_told() -> None:
    optimizer: dict = settings_of(zero_stage=2, offload_optimizer="cpu")["zero_optimization"]
    assert optimizer == {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    both: dict = settings_of(
        "cuda",
        zero_stage=3,
        offload_optimizer="nvme",
        offload_parameters="nvme",
        nvme_path="/local/nvme",
    )["zero_optimization"]
    place = {"device": "nvme", "pin_memory": True, "nvme_path": "/local/nvme"}
    assert both["offload_optimizer"] == place and both["offload_param"] == place
    none: dict = settings_of(zero_stage=3)["zero_optimization"]
    assert not {"offload_optimizer", "offload_param"} & none.keys()


def test_zero_plus_plus_reaches_deepspeed() -> None:
    plus = {"partition_size": 8, "quantized_weights": True, "quantized_gradients": True}
    zero_part: dict = settings_of(
        "cuda", workers=16, precision="fp16", zero_stage=3, zero_plus_plus=plus
    )["zero_optimization"]
    assert zero_part["zero_hpz_partition_size"] == 8
    assert zero_part["zero_quantized_weights"] and zero_part["zero_quantized_gradients"]


def test_deepspeed_itself_knows_every_key() -> None:
    """Its own schema forbids others, so that a renamed key cannot be ignored in silence."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    plus = {"partition_size": 2, "quantized_weights": True}
    for changes in (
        {"zero_stage": 0},
        {"zero_stage": 2, "offload_optimizer": "cpu"},
        {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/n"},
        {"zero_stage": 3, "offload_parameters": "nvme", "nvme_path": "/n", "zero_plus_plus": plus},
    ):
        for device in ("cpu", "cuda"):
            written: dict = settings_of(
                device, precision="bf16" if changes["zero_stage"] else "fp32", **changes
            )["zero_optimization"]
            known = DeepSpeedZeroConfig(**written)
            assert known.stage == changes["zero_stage"]
            for key in ("offload_optimizer", "offload_param"):
                read = getattr(known, key)
                assert (read is not None) is (key in written)
                assert read is None or read.device == written[key]["device"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.zero_stage=0", "train.offload_optimizer=cpu"], "needs train.zero_stage 1 or more"),
        (
            ["train.zero_stage=2", "train.offload_optimizer=nvme", "train.nvme_path=/n"],
            "nvme needs train.zero_stage 3, not 2",
        ),
        (["train.zero_stage=2", "train.offload_parameters=cpu"], "needs train.zero_stage 3, not 2"),
        (
            ["train.zero_stage=3", "train.offload_optimizer=nvme"],
            "an offload to nvme is set without train.nvme_path",
        ),
        (["train.nvme_path=/n"], "train.nvme_path is set without an offload to nvme"),
        (["train.nvme_path=n"], "train.nvme_path"),
        (["train.zero_plus_plus.partition_size=2"], "zero_plus_plus needs train.zero_stage 3"),
        (
            ["train.zero_stage=3", "train.zero_plus_plus.quantized_gradients=true"],
            "quantized_gradients needs train.precision fp16, not auto",
        ),
        (
            [
                "train.zero_stage=3",
                "train.zero_plus_plus.quantized_weights=true",
                "train.precision=fp32",
            ],
            "take precision bf16 or fp16",
        ),
        (["train.precision=fp16", "train.zero_stage=0"], "fp16 needs train.zero_stage 1 or more"),
        (["train.zero_stage=3", "train.compile=true"], "train.compile needs whole parameters"),
    ],
)
def test_what_cannot_be_is_refused_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loading.load("gpt-demo", overrides)


@pytest.mark.parametrize("key", ["loss_chunk=8", "activation_checkpointing=true"])
def test_settings_of_language_models_are_refused_for_images(key: str) -> None:
    with pytest.raises(ConfigError, match="family image_classifier knows no train"):
        loading.load("digits-cnn", [f"train.{key}"])


GPU_ONLY = [
    {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/n"},
    {"zero_stage": 3, "offload_parameters": "nvme", "nvme_path": "/n"},
    {"zero_stage": 3, "zero_plus_plus": {"partition_size": 2}},
    {"zero_stage": 3, "zero_plus_plus": {"quantized_weights": True}},
    {"precision": "fp16"},
]


@pytest.mark.parametrize("changes", GPU_ONLY, ids=str)
def test_without_a_gpu_it_is_refused_and_with_one_it_is_not(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"needs GPUs.* and the cluster has none"):
        zero.check(section(**changes), "cpu", workers=4)
    zero.check(section(**changes), "cuda", workers=4)


def test_a_partition_larger_than_a_node_is_refused() -> None:
    plus = section(zero_stage=3, zero_plus_plus={"partition_size": 8})
    with pytest.raises(ConfigError, match="workers 12 does not divide by .*partition_size 8"):
        zero.check(plus, "cuda", workers=12)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        zero.check(section(compile=True), "cpu", workers=1)
    zero.check(section(compile=True), "cuda", workers=1)
    zero.check(section(), "cpu", workers=1)


def test_what_runs_on_a_cpu_is_let_through() -> None:
    for stage in (0, 1, 2, 3):
        zero.check(section(zero_stage=stage), "cpu", workers=3)
    zero.check(
        section(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu"), "cpu", workers=2
    )
