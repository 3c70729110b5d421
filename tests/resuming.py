"""Resume at every step, as tests of any length do it."""

from pathlib import Path

from cluster import loading
from cluster.stages import resolved
from tests import exact, gloo
from tests.corpora import counting_corpus


def check_every_step(root: Path, *, stage: int, steps: int) -> None:
    """Two ranks; losses and gradient norms bit-equal, each sample once per epoch."""
    overrides = [
        f"storage.root={root}",
        "name=exact",
        "data.sequence_length=16",
        "model.hidden_size=32",
        "model.layers=2",
        "model.heads=2",
        "model.kv_heads=2",
        "model.intermediate_size=64",
        "train.steps=60",
        "train.global_batch=8",
        "train.warmup_steps=4",
        f"train.zero_stage={stage}",
    ]
    config = loading.load("gpt-demo", overrides)
    # Rows for an epoch of a few steps, so that an epoch's end is among them.
    counting_corpus(config, rows=36)
    for rank in gloo.launch(2, exact.resume_at_every_step, resolved(config), steps):
        assert rank["faults"] == []
        assert len(rank["resumed"]) == steps - 1
        assert rank["resumed"] == rank["undisturbed"]
        assert rank["other seed"] != rank["undisturbed"][-1]
