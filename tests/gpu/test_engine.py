"""The generation engine on a GPU: its contract, `generate`'s own tokens, and what was published."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.storage import Store
from serving.engines.fast import FastRunner
from serving.engines.linear import Plain
from serving.engines.loading import Options, open_generation, open_runner
from serving.replica import load_engine
from tests import tiny_model
from tests.engines import Subject, ids_of, reference_of, request, run
from tests.unit import test_engine_contract as contract

# Each test of the contract, with the subjects of this module.
globals().update({name: test for name, test in vars(contract).items() if name[:5] == "test_"})
PROMPTS = ["def ", "你好", "x", "import os\n\n"]
TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model.write(path)
    return path


@pytest.fixture(scope="module", params=["general", "fast", "fast-constant"])
def subject(request: pytest.FixtureRequest, folder: Path) -> Subject:
    return Subject(partial(_opened, request.param, folder), reference_of(folder))


def _opened(kind: str, folder: Path, slots: int = 4, spare: int = 2) -> Any:
    from transformers import AutoModelForCausalLM

    if kind == "general":
        return open_runner(folder, tiny_model.CONTEXT, Options(slots, fast=False))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    constant = kind == "fast-constant"
    spare = 0 if constant else spare
    runner = FastRunner(
        model, folder, slots=slots, length=tiny_model.CONTEXT, spare=spare, kind=Plain,
        precision="fp32", constant=constant,
    )  # fmt: skip
    runner.chunk = 16  # so that prompts of these tests are longer than a chunk
    return runner


def test_the_model_and_its_logits_are_on_the_gpu(folder: Path) -> None:
    before = torch.cuda.memory_allocated()
    runner: Any = open_runner(folder, tiny_model.CONTEXT, Options(slots=2))
    assert isinstance(runner, FastRunner) and runner.precision == "fp32"
    assert torch.cuda.memory_allocated() - before >= runner.cache_bytes
    assert runner._step.cache.is_cuda


@pytest.mark.parametrize("fast", [True, False])
def test_greedy_equals_generate_alone_and_in_a_full_batch(folder: Path, fast: bool) -> None:
    """`generate` runs on the CPU: what was published there is what is served here."""
    expected = [tiny_model.greedy(folder, prompt, TOKENS)[0] for prompt in PROMPTS]
    runner = open_runner(folder, tiny_model.CONTEXT, Options(slots=len(PROMPTS), fast=fast))
    asked = [request(prompt, str(n), max_tokens=TOKENS) for n, prompt in enumerate(PROMPTS)]
    assert [ids_of(events) for events in run(runner, *asked)] == expected
    assert [ids_of(run(runner, one)[0]) for one in asked] == expected


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_a_replica_proves_itself_in_each_precision(folder: Path, precision: Any) -> None:
    records = tiny_model.detail(folder)["prompts"]
    options = Options(slots=2, precision=precision)
    engine = open_generation(
        "model/tiny@1", folder, options, context_length=tiny_model.CONTEXT, records=records
    )
    assert engine._runner.precision == ("bf16" if precision == "bf16" else "fp32")
    engine.close()


def test_a_published_model_is_served_on_the_gpu(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    artifact = tiny_model.publish(store, tmp_path / "files")
    engine = load_engine(artifact, {"slots": 2, "max_waiting": 1, "threads": 1})
    assert engine.stats().cache_capacity
    engine.close()
