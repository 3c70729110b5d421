"""Longer runs under every sharding: three ranks, compiled blocks, offload that comes and goes."""

import os
import shutil
from pathlib import Path

import pytest

from cluster.storage import Store
from tests import gloo, ranks, variants
from tests.corpora import counting_corpus

STEPS = 20
STAGES = {f"stage {stage}": [f"train.zero_stage={stage}"] for stage in (0, 1, 2, 3)}
MASKED = ["model.document_masking=true", "train.loss_chunk=5"]
SETTINGS = STAGES | {f"{name}, masked": [*overrides, *MASKED] for name, overrides in STAGES.items()}
SETTINGS["stage 3, all at once"] = [
    "train.zero_stage=3",
    "train.offload_optimizer=cpu",
    "train.offload_parameters=cpu",
    "train.activation_checkpointing=true",
    *MASKED,
]


def test_three_ranks_over_twenty_steps() -> None:
    histories = gloo.launch(3, variants.histories, SETTINGS, STEPS)[0]
    for name, history in histories.items():
        losses = [loss for loss, _ in history]
        peer = "stage 0, masked" if "masked" in name or "all" in name else "stage 0"
        assert losses == pytest.approx([loss for loss, _ in histories[peer]], rel=1e-5), name
        assert losses[-1] < 0.7 * losses[0]
    assert histories["stage 0"] != histories["stage 0, masked"]


def test_autocast_is_the_same_in_chunks() -> None:
    """A chunked head stays in the precision of the whole: nearly the same curve."""
    autocast = ["train.precision=autocast", "train.zero_stage=2"]
    settings = {"whole": autocast, "chunks": [*autocast, "train.loss_chunk=5"]}
    histories = gloo.launch(2, variants.histories, settings, STEPS)[0]
    whole, chunks = ([loss for loss, _ in histories[name]] for name in ("whole", "chunks"))
    assert chunks == pytest.approx(whole, rel=5e-3)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled_blocks_train_the_same_model(stage: int) -> None:
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler here")
    eager = [f"train.zero_stage={stage}"]
    settings = {
        "eager": eager,
        "compiled": [*eager, "train.compile=true"],
        "with all": [*eager, "train.compile=true", "train.activation_checkpointing=true"],
    }
    histories = gloo.launch(2, variants.histories, settings, 5)[0]
    expected = [loss for loss, _ in histories["eager"]]
    for name in ("compiled", "with all"):
        assert [loss for loss, _ in histories[name]] == pytest.approx(expected, rel=1e-4)


def test_compiled_attention_is_that_of_the_kernel() -> None:
    """In bf16 the compiler also makes the attention: nearly the same curve."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler here")
    kernel = ["train.precision=autocast"]
    settings = {"kernel": kernel, "compiled": [*kernel, "train.compile=true"]}
    histories = gloo.launch(1, variants.histories, settings, STEPS)[0]
    kernel_losses, compiled = ([loss for loss, _ in histories[name]] for name in settings)
    assert compiled == pytest.approx(kernel_losses, rel=5e-3)
    assert compiled != kernel_losses


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_with_offload_and_without(tmp_path: Path, stage: int) -> None:
    """Where the optimizer's state lies is no part of it."""
    place = [f"storage.root={tmp_path}", "name=offload", f"train.zero_stage={stage}"]
    config = variants.configured("train.workers=2", *place)
    counting_corpus(config)
    offloaded = variants.configured("train.workers=2", "train.offload_optimizer=cpu", *place)
    trees = [c.model_dump(mode="json") for c in (config, offloaded)]
    whole = gloo.launch(2, ranks.steps, trees[0], 8)[0]["losses"]
    for first, second in (trees, reversed(trees)):
        before = gloo.launch(2, ranks.steps, first, 4, save_at=4)[0]["losses"]
        saved = Store(str(tmp_path)).latest("checkpoint", "offload")
        assert saved is not None
        after = gloo.launch(2, ranks.steps, second, 8, source=saved.version)[0]["losses"]
        assert [*before, *after] == pytest.approx(whole, rel=1e-6)
