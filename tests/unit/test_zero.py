import pytest

from cluster.config import TrainSection
from pipelines.training import zero


def section(**changes: object) -> TrainSection:
    return TrainSection.model_validate({"global_batch": 32} | changes)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("workers", "micro"), [(1, 0), (2, 0), (2, 4), (4, 8), (8, 1)])
def test_batch_is_micro_times_accumulation_times_workers(
    stage: int, workers: int, micro: int
) -> None:
    train = section(zero_stage=stage, micro_batch=micro)
    settings = zero.deepspeed_config(train, workers=workers, precision="fp32")
    product = (
        settings["train_micro_batch_size_per_gpu"]
        * settings["gradient_accumulation_steps"]
        * workers
    )
    assert product == settings["train_batch_size"] == 32
    assert settings["zero_optimization"]["stage"] == stage


def test_precision_reaches_the_engine() -> None:
    for precision in ("fp32", "autocast", "bf16"):
        settings = zero.deepspeed_config(section(), workers=1, precision=precision)
        assert settings["bf16"]["enabled"] is (precision == "bf16")
        assert settings["torch_autocast"]["enabled"] is (precision == "autocast")


def test_auto_precision_follows_device_and_stage() -> None:
    assert zero.precision(section(zero_stage=2), "cuda") == "bf16"
    assert zero.precision(section(zero_stage=0), "cuda") == "autocast"
    assert zero.precision(section(), "cpu") in ("autocast", "fp32")
    assert zero.precision(section(precision="fp32"), "cuda") == "fp32"


def test_deepspeed_builds_no_optimizer_of_its_own() -> None:
    """Its own ones compile at start; ours is torch's."""
    settings = zero.deepspeed_config(section(), workers=2, precision="fp32")
    assert "optimizer" not in settings and "scheduler" not in settings
