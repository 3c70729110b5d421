"""How well a language model predicts held-out text, beside what compressors make of it.

A model that gives the next token the probability p can store it in -log2 p bits (arithmetic
coding), so its loss is a file size, and `gzip` and `xz` are its rivals.
"""

from __future__ import annotations

import gzip
import lzma
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.families.base import Batch, Evaluation, EvaluationJob

if TYPE_CHECKING:
    import torch

Loss = Callable[["torch.nn.Module", Batch], "torch.Tensor"]
Count = Callable[[Batch], int]
SAMPLES = 3


@dataclass(frozen=True)
class Measured:
    """What the model predicted, and at what cost."""

    nats: float
    """Sum of the loss over the predictions."""
    predictions: int
    text: bytes
    """The documents that were predicted, end to end, without what separates them."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.predictions

    @property
    def bits_per_byte(self) -> float:
        """Gao et al. 2020, The Pile, arXiv:2101.00027, section 3.1: the loss in bits, summed over
        tokens, by the UTF-8 bytes of the text. Unlike perplexity it does not depend on the
        tokenizer."""
        return self.nats / math.log(2) / len(self.text)


def evaluate(job: EvaluationJob, *, loss: Loss, count: Count) -> Evaluation:
    """Bits per byte on held-out documents, and continuations from before and after training.

    Args:
        loss, count: the family's own; `batch["labels"]` are the predicted tokens, -100 for none.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.encoder_folder)
    measured = measure(job, Spelling.of(tokenizer), loss, count)
    sizes = {"gzip": len(gzip.compress(measured.text, 9)), "xz": _xz(measured.text)}
    per_byte = {name: 8 * size / len(measured.text) for name, size in sizes.items()}
    metrics = {
        "bits_per_byte": measured.bits_per_byte,
        "loss": measured.loss,
        "perplexity": math.exp(min(measured.loss, 700.0)),
        "gzip_bits_per_byte": per_byte["gzip"],
        "xz_bits_per_byte": per_byte["xz"],
        "measured_bytes": float(len(measured.text)),
        "measured_tokens": float(measured.predictions),
    }
    text = f"{_measure_text(job, measured, per_byte)}\n{_sample_text(job, tokenizer)}"
    return Evaluation(metrics, f"{measured.bits_per_byte:.3f} bits per byte", text)


def measure(job: EvaluationJob, spelling: Spelling, loss: Loss, count: Count) -> Measured:
    """One pass over the held-out batches.

    Raises:
        ValueError: if the batches predict no text.
    """
    import torch

    nats, predictions, text = 0.0, 0, bytearray()
    with torch.inference_mode():
        for batch in job.batches():
            nats += float(loss(job.model, batch))
            predictions += count(batch)
            labels = batch["labels"].cpu().numpy()
            text += spelling.bytes_of(labels[labels >= 0])
    if not text:
        raise ValueError("the held-out rows hold no text to measure on")
    return Measured(nats, predictions, bytes(text))


@dataclass(frozen=True)
class Spelling:
    """The bytes of each token of a byte-level tokenizer.

    Decoding to `str` would lose them where a row ends inside of a character.
    """

    table: Sequence[bytes]

    @staticmethod
    def of(tokenizer: Any) -> Spelling:
        special = set(tokenizer.all_special_ids)
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        return Spelling(
            [b"" if i in special else _token_bytes(token) for i, token in enumerate(tokens)]
        )

    def bytes_of(self, tokens: np.ndarray) -> bytes:
        return b"".join(self.table[token] for token in tokens.tolist())


def continuations(
    job: EvaluationJob, model: torch.nn.Module, tokenizer: Any, number: int
) -> list[str]:
    """Sampled continuations of `evaluate.prompt`; the same for the same seed."""
    import torch

    prompt, new_tokens = _room(job, tokenizer)
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    torch.manual_seed(job.config.seed)
    generate: Any = model.generate
    with torch.inference_mode():
        answers = generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=job.config.evaluate.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            num_return_sequences=number,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    return [tokenizer.decode(a[len(prompt) :], skip_special_tokens=True) for a in answers]


def _room(job: EvaluationJob, tokenizer: Any) -> tuple[list[int], int]:
    """The prompt's tokens and how many may follow, inside of the context that was trained."""
    config: Any = job.model.config
    context = int(config.max_position_embeddings)
    prompt = list(tokenizer(job.config.evaluate.prompt)["input_ids"]) or [tokenizer.eos_token_id]
    prompt = prompt[-max(1, context // 2) :]
    return prompt, min(job.config.evaluate.sample_tokens, context - len(prompt))


def _measure_text(job: EvaluationJob, measured: Measured, per_byte: dict[str, float]) -> str:
    size, whole = len(measured.text), job.heldout_bytes
    part = f"the first {size:,} of {whole:,}" if size < whole else f"all {size:,}"
    rows = [("this model", measured.bits_per_byte)]
    rows += [(f"{name} -9", value) for name, value in per_byte.items()]
    lines = [f"| {name:<10} | {value:13.3f} | {value / 8:13.1%} |" for name, value in rows]
    return "\n".join(
        [
            "## Held-out text",
            "",
            "|            | bits per byte | of plain text |",
            "|:-----------|--------------:|--------------:|",
            *lines,
            "",
            f"Measured on {part} held-out bytes: {measured.predictions:,} predicted tokens, "
            f"{measured.loss:.3f} nats each (perplexity {math.exp(min(measured.loss, 700)):.1f}).",
            "The compressors get the same bytes as one stream, which is kind to them: they may "
            "look back into other documents, the model sees one row at a time. Nobody's own size "
            "is counted.",
        ]
    )


def _sample_text(job: EvaluationJob, tokenizer: Any) -> str:
    evaluate = job.config.evaluate
    _, new_tokens = _room(job, tokenizer)
    before = continuations(job, job.untrained(), tokenizer, 1)
    after = continuations(job, job.model, tokenizer, SAMPLES)
    lines = ["", "## What it learned", "", "The prompt:", "", fenced(evaluate.prompt), ""]
    lines += [f"Continued by at most {new_tokens} tokens at temperature {evaluate.temperature:g}"]
    if new_tokens < evaluate.sample_tokens:
        lines[-1] += f" (evaluate.sample_tokens is {evaluate.sample_tokens}, the context is full)"
    lines[-1] += ". Before training:"
    lines += ["", fenced(before[0])]
    for number, text in enumerate(after, start=1):
        lines += ["", f"After training, sample {number} of {len(after)}:", "", fenced(text)]
    return "\n".join(lines)


def fenced(text: str) -> str:
    """A Markdown code block that the text cannot close, and that a terminal can show.

    A model may sample any control character, escape sequences among them.
    """
    shown = re.sub(
        r"[^\S\n\t ]|[\x00-\x08\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e]", "\ufffd", text
    )
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{shown}\n{fence}"


def _xz(text: bytes) -> int:
    return len(lzma.compress(text, preset=9))


def _token_bytes(token: str) -> bytes:
    letters = _letters()
    if all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    return token.encode()  # added to the vocabulary as plain text


@cache
def _letters() -> dict[str, int]:
    """Letter -> byte, as byte-level BPE writes its tokens.

    The alphabet of GPT-2 (Radford et al. 2019): printable Latin-1 bytes stand for themselves, the
    other 68 for the code points from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(_others(printable))
    }


def _others(printable: Sequence[int]) -> Iterator[int]:
    return (byte for byte in range(256) if byte not in set(printable))
