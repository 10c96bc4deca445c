"""Prompt-lookup speculation: python benchmarks/speculation.py [--new_tokens 200] [--repeats 3] [--tiny]

Decodes one text with the 124M model in float32 and bfloat16, with random weights, with and without speculation in turn. Where the
text repeats: greedy decoding, which falls into a loop with these weights. Where it does not: sampling at temperature 1,
where no guess is right. The texts must be the same, but for tokens that are nearly equally probable; the positions of
the first difference are counted. The last line is JSON.
"""

import argparse
import json
from typing import Any

import torch
from machine import at_least, description, interleaved, ratio

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.generation.engine import stream_ids
from gpt_lightning.generation.sampling import SamplingParams, make_generator
from gpt_lightning.generation.speculation import stream_speculative
from gpt_lightning.model.packed_linear import can_pack, pack_weights

TEXTS = {"repeats": SamplingParams(), "does not repeat": SamplingParams(1.0)}
TARGET = 1.5


def first_difference(one: list[int], other: list[int]) -> int | None:
    return next(
        (i for i, pair in enumerate(zip(one, other, strict=True)) if len(set(pair)) > 1), None
    )


def measure(
    model: GPTModel, prompt: list[int], name: str, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Time both ways to decode a text, and compare the ids."""
    ids: dict[str, list[int]] = {}

    def plain() -> None:
        steps = stream_ids(model, [prompt], new_tokens, TEXTS[name], generator=make_generator(1))
        ids["plain"] = [int(i) for i in steps]

    def ngram() -> None:
        steps = stream_speculative(
            model, prompt, new_tokens, TEXTS[name], generator=make_generator(1)
        )
        ids["ngram"] = [int(i) for i in steps]

    seconds = interleaved({"plain": plain, "ngram": ngram}, repeats)
    one = {
        "dtype": str(model.tok_emb.weight.dtype).removeprefix("torch."),
        "text": name,
        "seconds": seconds,
        "speedup": ratio(seconds["plain"], seconds["ngram"]),
        "first_difference": first_difference(ids["plain"], ids["ngram"]),
    }
    print(
        f"{one['dtype']}, a text that {name}: {new_tokens / min(seconds['plain']):.1f} → "
        f"{new_tokens / min(seconds['ngram']):.1f} tokens/s, {one['speedup']:.2f} ×; first difference: "
        f"{one['first_difference']}"
    )
    return one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--new_tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a toy model and few tokens")
    arguments = parser.parse_args()
    config = GPTConfig(drop_rate=0.0, qkv_bias=True, tied_embeddings=True)
    new_tokens = arguments.new_tokens
    if arguments.tiny:
        config = GPTConfig(vocab_size=500, context_length=64, emb_dim=32, n_heads=2, n_layers=2)
        new_tokens = 20
    measured = []
    dtypes = [torch.float32, *([torch.bfloat16] if can_pack(torch.bfloat16) else [])]
    for dtype in dtypes:
        torch.manual_seed(1)
        model = GPTModel(config).eval().to(dtype)
        pack_weights(model)
        prompt = torch.randint(config.vocab_size, (16,)).tolist()
        measured += [measure(model, prompt, name, new_tokens, arguments.repeats) for name in TEXTS]
    targets = [
        at_least(f"{one['dtype']}: speculation on a text that repeats", one["speedup"], TARGET)
        for one in measured
        if one["text"] == "repeats"
    ]
    print(json.dumps({"machine": description(), "measured": measured, "targets": targets}))


if __name__ == "__main__":
    main()
