"""A resumed step is the undisturbed one, bit for bit, with dropout and every generator in use."""

from pathlib import Path

from tests.resuming import check_every_step


def test_every_step_can_be_resumed(tmp_path: Path) -> None:
    """The chaos suite does it for all ZeRO stages and 50 steps."""
    check_every_step(tmp_path, stage=2, steps=4)
