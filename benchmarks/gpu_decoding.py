"""Decoding in benchmarks/gpu.py: greedy, in bfloat16, with each decode backend and with transformers."""

import math
import statistics
import time
from typing import Any

import torch
from machine import peak_memory, synchronize

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.generation.cuda_graph import GraphedDecodeStep, padded_length
from gpt_lightning.generation.engine import DecodeBackend, stream_ids
from gpt_lightning.generation.sampling import SamplingParams
from gpt_lightning.model.kv_cache import KVCache

PROMPT, NEW, WARM_UP = 64, 192, 8  # the first WARM_UP new tokens include prefill and capture
REPEATS = 3


def prompts(config: GPTConfig, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def ours(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> GPTModel:
    torch.manual_seed(0)
    with torch.device(device):
        return GPTModel(config).to(dtype).eval()


def measure(
    config: GPTConfig,
    device: torch.device,
    batch: int,
    backend: DecodeBackend,
    prompt: int,
    new: int,
) -> dict[str, Any]:
    """Tokens/s of all rows, medians of REPEATS: after the warm-up, and of complete calls, with prefill and capture."""
    model = ours(config, device, torch.bfloat16)
    ids = prompts(config, batch, prompt).tolist()
    steady, complete = [], []
    for repeat in range(REPEATS + 1):
        synchronize(device)
        start, reached = time.perf_counter(), {}
        for i, _ in enumerate(stream_ids(model, ids, new, SamplingParams(), backend=backend), 1):
            if i in (WARM_UP, new):
                synchronize(device)
                reached[i] = time.perf_counter()
        end = time.perf_counter()  # after the graph is freed, which takes milliseconds
        if repeat:
            steady.append(batch * (new - WARM_UP) / (reached[new] - reached[WARM_UP]))
            complete.append(batch * new / (end - start))
    # before the float32 model of the comparison is allocated
    metrics = rates(steady, complete) | peak_memory(device)
    return metrics | deviation(config, device, batch, backend, prompt)


def transformers(
    config: GPTConfig, device: torch.device, batch: int, prompt: int, new: int
) -> dict[str, Any]:
    """The same for GPT2LMHeadModel.generate. The time of its first WARM_UP tokens is measured separately."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.emb_dim,
                n_head=config.n_heads, n_layer=config.n_layers, pad_token_id=0, bos_token_id=None,
                eos_token_id=None,
            )
        )  # fmt: skip
    model = model.to(torch.bfloat16).eval()
    ids = prompts(config, batch, prompt).to(device)

    def seconds(tokens: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )
        synchronize(device)
        return time.perf_counter() - start

    seconds(WARM_UP)
    steady, complete = [], []
    for _ in range(REPEATS):
        first, total = seconds(WARM_UP), seconds(new)
        steady.append(batch * (new - WARM_UP) / max(total - first, 1e-9))
        complete.append(batch * new / total)
    return rates(steady, complete)


def rates(steady: list[float], complete: list[float]) -> dict[str, Any]:
    return {
        name: [round(rate, 1) for rate in (statistics.median(values), min(values), max(values))]
        for name, values in (
            ("tokens_per_second", steady),
            ("tokens_per_second_with_prefill", complete),
        )
    }


@torch.inference_mode()
def deviation(
    config: GPTConfig, device: torch.device, batch: int, backend: DecodeBackend, prompt: int
) -> dict[str, Any]:
    """Maximum difference between the logits of 12 steps and those of the eager model in float32.

    Both read the same tokens; the unit is the standard deviation of the logits. The tolerance is twice the deviation
    of the eager model in bfloat16.
    """
    steps = 12
    ids = prompts(config, batch, prompt + steps).to(device)

    def logits(dtype: torch.dtype, backend: DecodeBackend) -> torch.Tensor:
        model = ours(config, device, dtype)
        cache = KVCache.allocate(config, batch, padded_length(prompt + steps), device, dtype)
        model.features(ids[:, :prompt], cache)
        tokens = ids[:, prompt:].unbind(dim=1)
        if backend == "eager":
            return torch.stack(
                [model.head(model.features(t[:, None], cache)[:, -1]).float() for t in tokens]
            )
        step = GraphedDecodeStep(model, cache, None, fused=backend == "fused")
        stacked = torch.stack([step(t).float().clone() for t in tokens])
        captured, is_fused = step.is_captured, step.is_fused
        step.close()
        if device.type == "cuda" and not captured:
            raise RuntimeError("the step was not captured as a CUDA graph")
        if device.type == "cuda" and backend == "fused" and not is_fused:
            raise RuntimeError("the step did not run on the Triton kernels")
        return stacked

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        expected = logits(torch.float32, "eager")
    finally:
        torch.set_float32_matmul_precision(precision)

    def deviation_of(backend: DecodeBackend) -> float:
        return float((logits(torch.bfloat16, backend) - expected).abs().max() / expected.std())

    eager = deviation_of("eager")
    if backend == "eager":
        return {"bf16_deviation": eager}
    value = deviation_of(backend)
    return {
        "bf16_deviation": eager,
        "deviation": value if math.isfinite(value) else math.inf,
        "tolerance": 2 * eager,
    }
