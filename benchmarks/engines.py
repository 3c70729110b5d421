"""The engines that `engine.py` compares, each in a process of its own that waits for its turn.

    ours       the generation engine with its scheduler, sampler and text, without HTTP
    generate   transformers' `generate` over one static batch
    llama.cpp  the server of llama.cpp in process (xllamacpp), as many slots as requests

A turn is a line of JSON in: `prompts` (token ids) and `new` (tokens of each answer); and one out:
seconds from the first prompt to the last token, by the clock (`wall`) and of the processor (`cpu`),
and the tokens of the `first` answer.
"""

import asyncio
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Prompts = list[list[int]]
MOST = 32
"""Requests at once."""


class Ours:
    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        from serving.engines.loading import Options, open_generation

        began = time.perf_counter()
        options: Any = {"precision": precision, "threads": threads, "context": 640}
        self.engine = open_generation(
            "model/bench@1",
            folder,
            Options(slots=MOST, max_waiting=MOST, **options),
            context_length=640,
        )
        self.ready = time.perf_counter() - began

    def answers(self, prompts: Prompts, new: int) -> list[list[int]]:
        return asyncio.run(self._all(prompts, new))

    async def _all(self, prompts: Prompts, new: int) -> list[list[int]]:
        return await asyncio.gather(*(self._one(str(n), p, new) for n, p in enumerate(prompts)))

    async def _one(self, name: str, prompt: list[int], new: int) -> list[int]:
        from serving.engines.base import GenerationRequest, SamplingParameters, Tokens

        asked = GenerationRequest(name, tuple(prompt), SamplingParameters(new, temperature=0))
        ids: list[int] = []
        async for event in self.engine.submit(asked):
            if isinstance(event, Tokens):
                ids += event.ids
        return ids


class Generate:
    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def answers(self, prompts: Prompts, new: int) -> list[list[int]]:
        import torch

        ids = torch.tensor(prompts)
        with torch.inference_mode():
            answer = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                pad_token_id=0,
            )  # fmt: skip
        return answer[:, ids.shape[1] :].tolist()


class LlamaCpp:
    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(folder / f"{precision}.gguf")
        parameters.n_parallel, parameters.n_ctx = MOST, MOST * 640
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.endpoint_metrics, parameters.verbosity = False, -1
        self.server = xllamacpp.Server(parameters)
        self.pool = ThreadPoolExecutor(MOST)

    def answers(self, prompts: Prompts, new: int) -> list[list[int]]:
        return list(self.pool.map(lambda prompt: self._one(prompt, new), prompts))

    def _one(self, prompt: list[int], new: int) -> list[int]:
        answer: Any = self.server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": new,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
                "return_tokens": True,
            }
        )
        assert answer["usage"]["completion_tokens"] == new, answer
        return answer.get("tokens") or answer["choices"][0].get("tokens") or []


KINDS: dict[str, Any] = {"ours": Ours, "generate": Generate, "llama.cpp": LlamaCpp}


def main(kind: str, precision: str, folder: str, threads: str) -> None:
    # What libraries print must not get between the lines of the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = KINDS[kind](Path(folder), precision, int(threads))
    engine.answers([[1] * 16] * 2, 4)
    print(json.dumps({"ready": getattr(engine, "ready", None)}), file=out, flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        began, spent = time.perf_counter(), time.process_time()
        answers = engine.answers(turn["prompts"], turn["new"])
        wall, cpu = time.perf_counter() - began, time.process_time() - spent
        print(json.dumps({"wall": wall, "cpu": cpu, "first": answers[0]}), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
