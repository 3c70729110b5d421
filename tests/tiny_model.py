"""A published language model that is made in a second: random weights, byte-level tokenizer."""

from pathlib import Path
from typing import Any

from cluster.storage import Artifact, Store

CONTEXT = 128
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
"""Short, so that a chat fits into the context."""


def write(folder: Path, seed: int = 0, template: str | None = None) -> None:
    """Hugging Face layout. The vocabulary is the 256 bytes and an end-of-text token."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    end = vocabulary["<|endoftext|>"]
    shape = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        # Large weights make random logits far apart: no near-ties that rounding could turn.
        initializer_range=0.3,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(shape).eval()
    # Greedy text never ends by itself: logit 0 is never the largest of 257.
    model.lm_head.weight.data[end] = 0
    model.save_pretrained(folder)


def publish(
    store: Store, folder: Path, name: str = "tiny", seed: int = 0, template: str | None = None
) -> Artifact:
    """Commit such a model, written in `folder` first."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, seed, template)
    staging = store.stage("model", name)
    return staging.commit(
        staging.copy_tree(folder),
        fingerprint="f",
        config={},
        detail=detail(folder),
    )


def detail(folder: Path) -> dict[str, Any]:
    """What publishing writes down about such a folder."""
    from transformers import AutoModelForCausalLM

    from pipelines.publish import parity_prompts

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = parity_prompts(model, folder, ("def ", "一"))
    return {"family": "causal_lm", "context_length": CONTEXT, "prompts": prompts}


def greedy(folder: Path, prompt: str, tokens: int) -> tuple[list[int], str]:
    """What transformers' own `generate` continues with: ids and text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    ids = answer[0, inputs["input_ids"].shape[1] :].tolist()
    return ids, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
