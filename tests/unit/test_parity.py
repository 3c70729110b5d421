"""A replica proves itself against what publishing recorded, or does not come up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ServingError
from cluster.storage import Artifact, Store
from serving.engines import loading, parity
from serving.engines.fast import FastRunner
from serving.engines.linear import Int8, Packed
from serving.engines.loading import Options, open_generation, open_runner
from serving.replica import load_engine
from tests import tiny_model
from tests.engines import need

OPTIONS = {"slots": 2, "max_waiting": 1, "threads": 1}


def published(folder: Path, spoil: Callable[[Path], None]) -> Artifact:
    """A model whose folder was changed after its prompts were recorded; its digests are right."""
    files = folder / "files"
    files.mkdir()
    tiny_model.write(files)
    detail = tiny_model.detail(files)
    spoil(files)
    staging = Store(str(folder / "root")).stage("model", "tiny")
    return staging.commit(staging.copy_tree(files), fingerprint="f", config={}, detail=detail)


def nothing(folder: Path) -> None:
    pass


def one_matrix(folder: Path) -> None:
    """Two rows of one matrix change places."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[[0, 1]] = weight[[1, 0]]
    save_file(tensors, path, metadata={"format": "pt"})


def a_little(folder: Path) -> None:
    """One norm weight is off by a hundredth: the same tokens, other logits."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})


def tokenizer(folder: Path) -> None:
    """Two bytes are spelt the other way round."""
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text("utf-8"))
    vocabulary = tree["model"]["vocab"]
    vocabulary["d"], vocabulary["e"] = vocabulary["e"], vocabulary["d"]
    path.write_text(json.dumps(tree), "utf-8")


def one_loud_column(folder: Path) -> None:
    """Weights that meet an input of 0, and set the scale of all others of their row."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0] = 0
    tensors["model.layers.1.mlp.down_proj.weight"][:, 0] = 1e3
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(one_matrix, "apart"), (a_little, "apart, at most"), (tokenizer, "splits the recorded")],
)
def test_a_model_that_is_not_what_was_published_is_not_served(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    with pytest.raises(ServingError, match=f"model/tiny@1.*{message}"):
        load_engine(published(tmp_path, spoil), OPTIONS)


def test_the_published_model_is_served(tmp_path: Path) -> None:
    engine = load_engine(published(tmp_path, nothing), OPTIONS)
    assert engine.stats().cache_capacity
    engine.close()


def test_other_tokens_are_found_where_no_logits_were_recorded(tmp_path: Path) -> None:
    tiny_model.write(tmp_path)
    records = [
        {**record, "logits": [], "greedy": [token ^ 1 for token in record["greedy"]]}
        for record in tiny_model.detail(tmp_path)["prompts"]
    ]
    runner = open_runner(tmp_path, tiny_model.CONTEXT, Options(slots=1))
    with pytest.raises(ServingError, match="0 of 32 tokens agree"):
        parity.check("model/tiny@1", runner, records)


@pytest.mark.parametrize(("precision", "kind"), [("bf16", Packed), ("int8", Int8)])
def test_lower_precisions_stay_within_their_bounds_and_damage_does_not(
    tmp_path: Path, precision: Any, kind: Any
) -> None:
    from transformers import AutoModelForCausalLM

    need(kind, precision)
    tiny_model.write(tmp_path)
    records = tiny_model.detail(tmp_path)["prompts"]

    def runner() -> FastRunner:
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        return FastRunner(
            model, tmp_path, slots=1, length=tiny_model.CONTEXT, spare=0, kind=kind,
            precision=precision,
        )  # fmt: skip

    parity.check("model/tiny@1", runner(), records)
    one_matrix(tmp_path)
    with pytest.raises(ServingError):
        parity.check("model/tiny@1", runner(), records)


def test_a_model_that_8_bits_spoil_is_served_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kinds: dict[Any, Any] = {"int8": Int8, "fp32": Packed}
    # Whatever is fast here: the proof is what decides.
    monkeypatch.setattr(
        loading, "choose_kind", lambda _, precision, *, twice: (precision, kinds[precision])
    )
    tiny_model.write(tmp_path)
    one_loud_column(tmp_path)
    records = tiny_model.detail(tmp_path)["prompts"]
    options = Options(slots=1, precision="int8")

    def opened(records: Any) -> Any:
        engine = open_generation(
            "model/tiny@1", tmp_path, options, context_length=tiny_model.CONTEXT, records=records
        )
        engine.close()
        return engine._runner

    assert opened(()).precision == "int8" and "served unproved" in caplog.text
    assert opened(records).precision == "fp32"
    assert "int8 of model/tiny@1 leaves the bounds: fp32 it is" in caplog.text
    # What fp32 does not answer either is not served.
    one_matrix(tmp_path)
    with pytest.raises(ServingError, match="apart"):
        opened(records)
