"""What the families share of Hugging Face's layout: writing it, and looking at what was written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import HeliostatError

if TYPE_CHECKING:
    import torch

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack"}
"""Weight formats that run code when they are opened, or that nobody should need."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def export(model: torch.nn.Module, encoder_folder: Path, target: Path) -> None:
    """Weights as safetensors, config, the encoder's files; for a model that generates, a
    generation config whose special tokens are the config's and the tokenizer's.

    Raises:
        HeliostatError: if config and tokenizer disagree about a special token.
    """
    hugging: Any = model
    hugging.save_pretrained(target)
    for file in sorted(encoder_folder.iterdir()):
        if file.is_file() and file.name != "config.json":
            shutil.copyfile(file, target / file.name)
    if hugging.can_generate():
        _save_generation_config(hugging.config, target)


def check_layout(folder: Path) -> None:
    """
    Raises:
        HeliostatError: if the folder holds anything but safetensors as weights, or none.
    """
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    unsafe = sorted(name for name in names if Path(name).suffix in PICKLES)
    if unsafe:
        raise HeliostatError(f"a model is published as safetensors only, not {', '.join(unsafe)}")
    missing = [name for name in ("config.json", "README.md") if name not in names]
    if not any(name.endswith(".safetensors") for name in names):
        missing.append("*.safetensors")
    if missing:
        raise HeliostatError(f"the published folder lacks {', '.join(missing)}")


def greedy(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> list[int]:
    """What the model continues a prompt with when it always takes the likeliest token."""
    import torch

    generate: Any = model.generate
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    with torch.inference_mode():
        answer = generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=new_tokens,
        )
    return [int(token) for token in answer[0, len(prompt) :]]


def next_logits(model: torch.nn.Module, prompt: list[int], count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens after a prompt, each with its logit."""
    import torch

    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    with torch.inference_mode():
        row = model(tokens).logits[0, -1].float()
        values, ids = row.topk(min(count, len(row)))
    return [(int(token), float(value)) for token, value in zip(ids, values, strict=True)]


def _save_generation_config(config: Any, target: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    for key in SPECIAL:
        ours, theirs = getattr(config, key), getattr(tokenizer, key)
        if ours != theirs:
            raise HeliostatError(
                f"the model's {key} is {ours} and its tokenizer's {theirs}: the corpus and the "
                "checkpoint do not belong together"
            )
    GenerationConfig(**{key: getattr(config, key) for key in SPECIAL}).save_pretrained(target)
