"""Greedy decoding beside transformers: python benchmarks/generation.py [--repeats 5] [--tiny]

The 124M shape with random weights, prompt of 64 tokens, 64 new ones. The last line is JSON.
"""

import argparse
import json
import statistics
import time
import warnings

import torch
from machine import at_least, at_most, description, interleaved, ratio

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.generation.generate import stream_ids
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.packed import pack_weights

PROMPT, NEW = 64, 64


def ours(config: GPTConfig, dtype: torch.dtype) -> GPTModel:
    """As the generate command has it."""
    torch.manual_seed(0)
    model = GPTModel(config).to(dtype).eval()
    pack_weights(model)
    return model


def theirs(config: GPTConfig, dtype: torch.dtype):
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    hf = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.emb_dim,
        n_head=config.n_heads,
        n_layer=config.n_layers,
        pad_token_id=0,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(hf).to(dtype).eval()


def decode(model: GPTModel, prompts: list[list[int]], new: int = NEW) -> int:
    return sum(1 for _ in stream_ids(model, prompts, new, Sampling()))


def seconds_per_token(model: GPTModel, new: int, at: list[int], width: int) -> list[float]:
    """Median seconds of a token around each of the positions ``at``, from one run of ``new`` tokens."""
    times = []
    last = time.perf_counter()
    for _ in stream_ids(model, [[1] * 16], new, Sampling()):
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return [statistics.median(times[place - width // 2 : place + width // 2]) for place in at]


def measure(
    config: GPTConfig, dtype: torch.dtype, repeats: int
) -> tuple[dict[str, list[float]], list[dict]]:
    """Tokens a second (median, lowest, highest) of each way, and the bars, at one dtype."""
    name = str(dtype).removeprefix("torch.")
    model, peer = ours(config, dtype), theirs(config, dtype)
    prompt = torch.randint(
        config.vocab_size, (8, PROMPT), generator=torch.Generator().manual_seed(1)
    )

    def peer_decode() -> None:
        peer.generate(
            prompt[:1],
            attention_mask=torch.ones_like(prompt[:1]),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
        )

    with torch.inference_mode():
        seconds = interleaved(
            {
                "ours": lambda: decode(model, prompt[:1].tolist()),
                "transformers": peer_decode,
                "ours, batch 8": lambda: decode(model, prompt.tolist()),
            },
            repeats,
        )
    figures = {}
    for way, values in seconds.items():
        rates = sorted((8 if "batch 8" in way else 1) * NEW / value for value in values)
        median = statistics.median(rates)
        figures[f"{name}, {way}"] = [round(rate, 1) for rate in (median, rates[0], rates[-1])]
        print(f"{name:9} {way:14} {median:8.1f} tok/s  ({rates[0]:.1f} – {rates[-1]:.1f})")
    beside = ratio(seconds["transformers"], seconds["ours"])
    batched = 8 * ratio(seconds["ours"], seconds["ours, batch 8"])
    return figures, [
        at_least(f"{name}: ours / transformers", beside, 1.2),
        at_least(f"{name}: batch 8 / batch 1", batched, 4.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a toy model, to see that it runs")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    config = GPT2_SIZES["gpt2-124M"]
    if arguments.tiny:
        config = GPTConfig(
            vocab_size=500, context_length=1024, emb_dim=32, n_heads=2, n_layers=2,
            qkv_bias=True, tied_embeddings=True,
        )  # fmt: skip
    figures: dict[str, list[float]] = {}
    bars: list[dict] = []
    for dtype in (torch.float32, torch.bfloat16):
        own_figures, own_bars = measure(config, dtype, arguments.repeats)
        figures |= own_figures
        bars += own_bars
    early, late = seconds_per_token(ours(config, torch.float32), 930, at=[64, 900], width=40)
    bars.append(at_most("seconds a token at 900 / at 64", late / early, 1.15))
    for bar in bars:
        print("holds " if bar["holds"] else "MISSED", bar)
    result = {"benchmark": "generation", "machine": description("transformers")}
    print(json.dumps({**result, "tokens_per_second": figures, "bars": bars}))


if __name__ == "__main__":
    main()
