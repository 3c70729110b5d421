"""Models that the benchmarks serve: two sizes, random weights, as Hugging Face folders and as GGUF.

Random weights cost as much to multiply as trained ones. The folders name no end-of-text token, so
that every answer is as long as was asked for.
"""

import json
import sysconfig
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "10m": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 1024,
    },
    "90m": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "intermediate_size": 2048,
    },
}
VOCABULARY = 8192
CONTEXT = 1024
GGUF_TYPES = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}
"""Our precisions, and the nearest of llama.cpp."""


def write(folder: Path, size: str, seed: int = 0) -> None:
    """A published model of a size, with a byte-level tokenizer of 8,192 entries."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        **SIZES[size],
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(shape).save_pretrained(folder)
    GenerationConfig(bos_token_id=None, eos_token_id=None).save_pretrained(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    standard = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text("utf-8", errors="replace") for path in sorted(standard.glob("*.py"))]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
    assert tokenizer.get_vocab_size() == VOCABULARY
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)


def write_gguf(folder: Path, target: Path, precision: str) -> None:
    """The same weights as llama.cpp reads them; norms stay fp32, as its own converter has it."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quants
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    kind = GGMLQuantizationType[GGUF_TYPES[precision]]
    writer = GGUFWriter(str(target), "llama")
    _add_shape(writer, config)
    _add_tokenizer(writer, folder)
    for name, tensor in tensors.items():
        values = np.asarray(tensor, dtype=np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            values = _interleaved(values, config[key])
        held = GGMLQuantizationType.F32 if values.ndim == 1 else kind
        writer.add_tensor(_gguf_name(name), quants.quantize(values, held), raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Any, heads: int) -> Any:
    """llama.cpp turns neighbours where Hugging Face turns halves."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: Any, folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_token_merges(pairs)
    writer.add_add_bos_token(False)


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        number, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{NAMES[part]}.weight"
    return f"{NAMES[stem]}.weight"
