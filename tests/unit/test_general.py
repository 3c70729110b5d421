"""The general path over models of many kinds: what comes in company is what comes alone."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from serving.engines.general import GeneralRunner
from tests import tiny_model
from tests.engines import greedy, ids_of, request, run

# Large weights: no near-ties that rounding could turn.
SMALL: dict[str, Any] = {"vocab_size": 257, "initializer_range": 0.3, "eos_token_id": None}
MODELS: dict[str, tuple[Callable[[], Any], bool]] = {
    # Positions are an argument, follow from the mask, are a slope, or are turned.
    "gpt2": (lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, **SMALL), True),
    "opt": (
        lambda: transformers.OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
            word_embed_proj_dim=32, vocab_size=257, init_std=0.3, eos_token_id=None,
        ),
        True,
    ),
    "bloom": (lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, **SMALL), True),
    "qwen3": (
        lambda: transformers.Qwen3Config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, **SMALL,
        ),
        True,
    ),
    "mixtral": (
        lambda: transformers.MixtralConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, **SMALL,
        ),
        True,
    ),
    # Its cache keeps a window only, which does not line up with a neighbour's.
    "mistral": (
        lambda: transformers.MistralConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=8, **SMALL,
        ),
        False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_model.write(path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_in_company_is_what_comes_alone(name: str, folder: Path) -> None:
    shape, together = MODELS[name]
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(shape()).eval()
    runner = GeneralRunner(model, folder, slots=4, length=96)
    assert runner.constant == (not together)
    passes: list[int] = []
    model.register_forward_hook(
        lambda module, args, given, out: passes.append(len(out.logits)), with_kwargs=True
    )
    rng = random.Random(1)
    prompts = [bytes(rng.randrange(256) for _ in range(rng.randint(1, 30))) for _ in range(10)]
    counts = [rng.randint(1, 24) for _ in prompts]
    asked = [
        request(tuple(prompt), str(n), max_tokens=count)
        for n, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]
    answers = run(runner, *asked)
    alone = list(passes)

    def reference(ids: Any) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(torch.tensor([list(ids)])).logits[0]
            return logits

    for prompt, count, events in zip(prompts, counts, answers, strict=True):
        assert ids_of(events) == greedy(reference, list(prompt), count, runner.end)
    assert max(alone) == (4 if together else 1)
    if together:  # a pass for each prompt, and far fewer than one for each further token
        assert len(alone) < len(prompts) + sum(counts) / 2
