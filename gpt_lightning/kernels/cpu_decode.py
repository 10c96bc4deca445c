"""The C code of decoding steps and prompts on a CPU (cpu_decode.c): its structures and functions."""

import ctypes
import functools
import logging
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

from gpt_lightning.kernels.c_compiler import compiler_unsupported_reason, load_library

logger = logging.getLogger(__name__)

GROUP = 64  # neighbouring numbers with a scale of their own
FLOAT32, BFLOAT16, INT8, INT4 = range(4)


class Linear(Structure):
    """Linear layer: addresses of its tensors, the type of its weight, and its shape."""

    _fields_ = (
        ("weight", c_void_p), ("scales", c_void_p), ("lines", c_void_p), ("bias", c_void_p),
        ("type", c_int32), ("rows", c_int32), ("columns", c_int32),
    )  # fmt: skip


class Norm(Structure):
    """LayerNorm; without weight and bias it only normalizes."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_float))


class Block(Structure):
    """Transformer block with its part of the KV cache."""

    _fields_ = (
        ("norm1", Norm), ("norm2", Norm),
        ("qkv", Linear), ("out_proj", Linear), ("up", Linear), ("down", Linear),
        ("keys", c_void_p), ("values", c_void_p),
    )  # fmt: skip


class Model(Structure):
    """GPT model; ``type`` is that of the embeddings and of the KV cache."""

    _fields_ = (
        ("tok_emb", c_void_p), ("pos_emb", c_void_p),
        ("type", c_int32), ("n_layers", c_int32), ("emb_dim", c_int32), ("n_heads", c_int32), ("max_length", c_int32),
        ("blocks", POINTER(Block)), ("final_norm", Norm), ("head", Linear),
    )  # fmt: skip


class Row(Structure):
    """Token of a step, with its position, where the cache stores its key and value, and the first column it attends to."""

    _fields_ = (
        ("token", c_int64),
        ("position", c_int32), ("cache_row", c_int32), ("column", c_int32), ("first", c_int32),
    )  # fmt: skip


@functools.cache
def find_library(folder: Path) -> ctypes.CDLL | None:
    """The compiled code, which ``folder`` keeps. ``None`` if it cannot be compiled here; the log says why, once."""
    if reason := compiler_unsupported_reason():
        logger.debug(f"cpu_decode.c: {reason}, so torch's kernels decode")
        return None
    try:
        library = load_library(Path(__file__).with_suffix(".c"), folder)
        library.decode_room.argtypes = (POINTER(Model), c_int32, c_int32)
        library.decode_room.restype = c_size_t
        library.decode_step.argtypes = (
            POINTER(Model), POINTER(Row), c_int32, c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_void_p,
        )  # fmt: skip
        library.decode_step.restype = None
    except (OSError, AttributeError) as error:  # the second: the compiler is not one of C
        logger.warning(f"cpu_decode.c: {error}; torch's kernels decode, more slowly")
        return None
    return library
