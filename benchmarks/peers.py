"""One way to take a training step, in a process of its own: benchmarks/training.py starts it, with the interpreter in
which the peer is installed. Each line on standard input is answered by a step's seconds, "memory" by the process's peak.

usage: python peers.py WAY SETTINGS   (SETTINGS: JSON with the architecture, batch, length, precision)
"""

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of inputs and targets (B, T)


def ours(settings: dict[str, Any]) -> tuple[torch.nn.Module, Loss]:
    from gpt_lightning import GPTConfig, GPTModel
    from gpt_lightning.model.loss import chunked_cross_entropy, cross_entropy
    from gpt_lightning.training.allocator import keep_freed_memory

    keep_freed_memory()  # as fit does
    model = GPTModel(GPTConfig(**settings["config"]))
    if settings.get("compile"):
        for block in model.trf_blocks:
            block.compile()
    chunk = settings.get("chunk")

    def loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if chunk is None:
            return cross_entropy(model(inputs), targets)
        return chunked_cross_entropy(model.features(inputs), model.head_weight, targets, chunk)

    return model, loss


def of_logits(logits: Callable[[torch.Tensor], torch.Tensor]) -> Loss:
    return lambda inputs, targets: F.cross_entropy(logits(inputs).flatten(0, 1), targets.flatten())


def transformers(settings: dict[str, Any]) -> tuple[torch.nn.Module, Loss]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = settings["config"]
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config["vocab_size"], n_positions=config["context_length"], n_embd=config["emb_dim"],
            n_head=config["n_heads"], n_layer=config["n_layers"], attn_pdrop=0.0, embd_pdrop=0.0,
            resid_pdrop=0.0, use_cache=False, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    return model, of_logits(lambda inputs: model(inputs).logits)


def litgpt(settings: dict[str, Any]) -> tuple[torch.nn.Module, Loss]:
    """Pythia's architecture in the same shape: LitGPT has no GPT-2. Its head is not tied."""
    from litgpt.config import Config
    from litgpt.model import GPT

    config = settings["config"]
    model = GPT(
        Config.from_name(
            "pythia-160m", n_layer=config["n_layers"], n_embd=config["emb_dim"], n_head=config["n_heads"],
            padded_vocab_size=config["vocab_size"], block_size=config["context_length"],
        )
    )  # fmt: skip
    return model, of_logits(model)


def book(settings: dict[str, Any]) -> tuple[torch.nn.Module, Loss]:
    """The book's model, as in tests/book.py; its head is not tied."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from book import BookGPT

    model = BookGPT(settings["config"])
    return model, of_logits(model)


def step_of(way: str, settings: dict[str, Any]) -> Callable[[], None]:
    torch.manual_seed(0)
    makers = {"ours": ours, "transformers": transformers, "litgpt": litgpt, "book": book}
    model, loss = makers[way](settings)
    model.train()
    # the book's loop has torch's default AdamW, the others the fused one
    fused = None if way == "book" else True
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused
    )
    generator = torch.Generator().manual_seed(0)
    shape = (settings["batch"], settings["length"] + 1)
    ids = torch.randint(settings["config"]["vocab_size"], shape, generator=generator)
    bf16 = settings["precision"] == "bf16"

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            value = loss(ids[:, :-1], ids[:, 1:])
        value.backward()
        optimizer.step()

    return step


def main() -> None:
    warnings.filterwarnings("ignore")
    step = step_of(sys.argv[1], json.loads(sys.argv[2]))
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
            continue
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
