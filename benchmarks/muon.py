"""Cost of Muon's products: python benchmarks/muon.py [--rounds 3] [--precision bf16-mixed] [--tiny]

Times the optimizer step of Muon and of AdamW, and the forward and backward pass of a micro-batch of 4 windows of 1,024
tokens, for the 124M model. They take turns. The share is what Muon adds to a step of 32,768 tokens: eight micro-batches and
AdamW's step; the target is 8 %. The last line is JSON.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from machine import at_most, description, interleaved

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.model.flops import flops_per_token, muon_flops
from gpt_lightning.model.loss import chunked_cross_entropy
from gpt_lightning.model.precision import PRECISIONS
from gpt_lightning.training.optimizer import OptimizerConfig

WINDOWS, LENGTH = 4, 1024
STEPS = (4_096, 32_768, 524_288)  # tokens
TARGET = 0.08


def optimizer_step(model: GPTModel, name: str, precision: str) -> Callable[[], None]:
    """A step with the gradients that the model has; the learning rate is too small to change its weights."""
    optimizer = OptimizerConfig(optimizer=name, lr=1e-12, weight_decay=0.0).build(
        model, precision=precision
    )
    return lambda: optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), default="bf16-mixed")
    parser.add_argument("--tiny", action="store_true", help="a toy model and short windows")
    arguments = parser.parse_args()
    config = GPTConfig(drop_rate=0.0, qkv_bias=True, tied_embeddings=True)
    windows, length = WINDOWS, LENGTH
    if arguments.tiny:
        config = GPTConfig(vocab_size=500, context_length=16, emb_dim=32, n_heads=2, n_layers=2)
        windows, length = 2, 16
    torch.manual_seed(1)
    model = GPTModel(config)
    idx = torch.randint(config.vocab_size, (windows, length))
    autocast = PRECISIONS[arguments.precision][1]

    def micro_batch() -> None:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            features = model.features(idx)
            loss = chunked_cross_entropy(features, model.head_weight, idx, 1024)
        loss.backward()

    micro_batch()
    seconds = interleaved(
        {
            "micro-batch": micro_batch,
            "Muon": optimizer_step(model, "muon", arguments.precision),
            "AdamW": optimizer_step(model, "adamw", arguments.precision),
        },
        arguments.rounds,
    )

    def share(tokens: int, round_: int) -> float:
        batches = tokens / (windows * length)
        before = batches * seconds["micro-batch"][round_] + seconds["AdamW"][round_]
        return (seconds["Muon"][round_] - seconds["AdamW"][round_]) / before

    rounds = range(arguments.rounds)
    shares = {tokens: statistics.median(share(tokens, i) for i in rounds) for tokens in STEPS}
    by_flops = {
        tokens: muon_flops(config) / (tokens * flops_per_token(config, length)) for tokens in STEPS
    }
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.3f} s ({min(values):.3f} - {max(values):.3f})")
    for tokens, value in shares.items():
        print(f"{tokens:,} tokens: {value:.1%}; by FLOPs {by_flops[tokens]:.1%}")
    print(
        json.dumps(
            {
                "machine": description("lightning"),
                "precision": arguments.precision,
                "seconds": seconds,
                "shares": shares,
                "by_flops": by_flops,
                "targets": [
                    at_most("Muon's share of a step of 32,768 tokens", shares[32_768], TARGET)
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
