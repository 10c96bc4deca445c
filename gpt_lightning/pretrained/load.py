"""Models and tokenizers that SOURCE names, ready to use."""

import logging
from dataclasses import replace

import torch

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.model.decoding_layout import prepare_for_decoding
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.int4_linear import has_int4_kernel
from gpt_lightning.model.precision import has_float64
from gpt_lightning.model.quantize import (
    INT4,
    QUANTIZED_DTYPES,
    quantize_unsupported_reason,
)
from gpt_lightning.pretrained.source import (
    check_heads,
    check_tokenizer,
    print_warnings,
    read_weights,
    with_ema,
)
from gpt_lightning.pretrained.weights import (
    ModelWeights,
    pop_weights,
)

logger = logging.getLogger(__name__)


def load_model(
    source: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    n_heads: int | None = None,
    ema: bool = False,
) -> GPTModel:
    """Load the model that ``source`` names, in eval mode. Errors are those of :func:`read_weights`.

    A warning says if its tokenizer cannot be read; its token ids can be used all the same.

    Args:
        dtype: Of the weights. ``None``: as stored.
        n_heads: As in :func:`read_weights`.
        ema: Whether to load the exponential moving average of the weights, see :func:`with_ema`.
    """
    weights = read_weights(source, n_heads=n_heads)
    check_heads(weights, source, n_heads)
    if ema:
        weights = with_ema(weights, source)
    if weights.other_tokenizer is not None:
        line = f"{source}: has another tokenizer than GPT-2's: {weights.other_tokenizer}"
        weights = replace(weights, warnings=(*weights.warnings, line))
    print_warnings(weights)
    return build_model(replace(weights, optimizer_state=None), device=device, dtype=dtype)


def load_for_text(
    source: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    n_heads: int | None = None,
    rows: int | None = None,
) -> tuple[GPTModel, Tokenizer]:
    """Load a model as :func:`load_model` does, and its tokenizer; a model without one is refused.

    The model is prepared for decoding, see :func:`build_for_decoding`, which takes ``dtype`` and ``rows`` too.
    """
    weights = read_weights(source, n_heads=n_heads)
    check_heads(weights, source, n_heads)
    check_tokenizer(weights, source)
    print_warnings(weights)
    model = build_for_decoding(
        replace(weights, optimizer_state=None), device=device, dtype=dtype, rows=rows
    )
    return model, weights.tokenizer


def build_for_decoding(
    weights: ModelWeights,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    rows: int | None = None,
) -> GPTModel:
    """The model in eval mode with matrices in the layout that its device decodes fastest: :func:`prepare_for_decoding`.

    Args:
        dtype: Of the weights; ``None``: as stored. ``torch.int8`` or ``torch.int4``: of the matrices, see
            :func:`quantize_weights`; all else is float32.
        rows: Number of texts that are decoded at once, ``None`` if it varies.

    Raises:
        ValueError: The device has no kernel for the dtype.
    """
    is_quantized = dtype is not None and dtype in QUANTIZED_DTYPES
    if dtype is not None and is_quantized:
        if reason := quantize_unsupported_reason(dtype, torch.device(device or "cpu")):
            raise ValueError(f"dtype: {reason}; give bfloat16")
        if dtype == INT4 and not has_int4_kernel():
            logger.warning(
                "dtype: torch has no fast kernel for int4 on this CPU; the weights are rounded to 4 bits, "
                "but take the memory and the time of float32"
            )
    model = build_model(weights, device=device, dtype=torch.float32 if is_quantized else dtype)
    prepare_for_decoding(model, dtype, rows=rows)
    return model


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of the model that ``source`` names; ``ValueError`` if it cannot be read."""
    weights = read_weights(source)
    check_tokenizer(weights, source)
    return weights.tokenizer


def build_model(
    weights: ModelWeights,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GPTModel:
    """The model with these weights, in eval mode. The tensors move into it: ``weights`` is empty afterwards."""
    with torch.device("meta"):
        model = GPTModel(weights.config)
    model.load_state_dict(pop_weights(weights, dtype), assign=True)
    if (
        model.tok_emb.weight.dtype == torch.float64
        and device is not None
        and not has_float64(torch.device(device))
    ):
        raise ValueError(f"dtype: {device} has no float64; give --dtype float32")
    return model.to(device=device).eval()
