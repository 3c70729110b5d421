"""Tests on a GPU: `make test-gpu`. Elsewhere each says that there is none."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU that PyTorch can use")
