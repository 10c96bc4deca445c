"""Files of weights, and changes to them."""

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import book
from gpt_lightning import GPTModel


def flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(share * path.stat().st_size))


# like a disk that is full after some bytes; the signal is ignored, since a full disk sends none
FILE_SIZE_LIMITED = """
import resource, signal, sys
from gpt_lightning.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


needs_tensorflow = pytest.mark.skipif(
    find_spec("tensorflow") is None, reason="TensorFlow is not installed: pip install '.[openai]'"
)


# width and heads in the proportions of the four sizes, small
SHAPES = {"124M": (24, 12), "355M": (32, 16), "774M": (40, 20), "1558M": (50, 25)}
SIZES = [
    "124M",
    *(pytest.param(size, marks=pytest.mark.slow) for size in ("355M", "774M")),
    "1558M",
]


@torch.inference_mode()
def assert_same_logits(ours: GPTModel, theirs: Any, idx: Tensor) -> None:
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-5, rtol=1e-5)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(50257, shape, generator=torch.Generator().manual_seed(4))


def edit_json(path: Path, **changes: Any) -> None:
    """Set the keys of a JSON object; ``None`` removes a key."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content), encoding="utf-8")


def book_model(**settings: Any) -> tuple[book.BookGPT, dict[str, Any]]:
    cfg = {"vocab_size": 50257, "context_length": 16, "emb_dim": 64, "n_heads": 1, "n_layers": 2,
           "drop_rate": 0.0, "qkv_bias": False, **settings}  # fmt: skip
    torch.manual_seed(6)
    return book.BookGPT(cfg).eval(), cfg


def nanogpt_file(
    theirs: Any, rename: Callable[[str], str] = str, **settings: Any
) -> dict[str, Any]:
    """nanoGPT's ``ckpt.pt`` with the weights of a model of transformers'."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[rename(name)] = tensor.t().contiguous() if transposed else tensor
    config = theirs.config
    arguments = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
                 "block_size": config.n_positions, "bias": True, "vocab_size": config.vocab_size,
                 "dropout": 0.0, **settings}  # fmt: skip
    return {"model": state, "model_args": arguments}


def swap(path: Path, *keys: str) -> None:
    """Swap the first two entries of a list or dict in a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    inner = content
    for key in keys:
        inner = inner[key]
    one, other = (0, 1) if isinstance(inner, list) else list(inner)[:2]
    inner[one], inner[other] = inner[other], inner[one]
    path.write_text(json.dumps(content), encoding="utf-8")
