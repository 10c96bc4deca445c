"""Matrices of a model in 8 or 4 bits, which make CPU inference faster. For inference only."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gpt_lightning.model.gpt import GPTModel, TransformerBlock
from gpt_lightning.model.int4_linear import Int4Linear, has_int4_kernel, rounded_linear
from gpt_lightning.model.int8_linear import Int8Linear, has_int8_kernel

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # missing in torch's type stubs
QUANTIZED_DTYPES = (torch.int8, INT4)


def quantize_unsupported_reason(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a device cannot compute with weights in ``torch.int8`` or ``torch.int4``; ``None`` if it can."""
    name = str(dtype).removeprefix("torch.")
    if device.type != "cpu":
        return f"{name} has no kernel for {device.type}"
    if dtype == torch.int8 and not has_int8_kernel():
        return "int8 has no kernel for this CPU"
    return None


@torch.no_grad()
def quantize_weights(model: GPTModel, dtype: torch.dtype, *, keep_codes: bool = False) -> None:
    """Replace all matrices but the embeddings with quantized ones, in place. The model can no longer be trained.

    The gains and biases of the norms become part of the matrices after them. Otherwise channels with a large gain
    would take the bits of the others.

    Args:
        model: In float32, on a CPU.
        dtype: ``torch.int8``, or ``torch.int4``, with which the head still has 8 bits: logits in bfloat16 would often be equal.
        keep_codes: Whether to keep a copy of the weights for our C code, too.
    """
    linear: Callable[[Tensor, Tensor | None], nn.Module]
    head: Callable[[Tensor, Tensor | None], nn.Module]
    head = linear = partial(Int8Linear, keep_codes=keep_codes)
    if dtype == INT4:
        linear = partial(Int4Linear, keep_codes=keep_codes) if has_int4_kernel() else rounded_linear
    for block in model.trf_blocks:
        assert isinstance(block, TransformerBlock)
        qkv, out_proj = block.att.qkv, block.att.out_proj
        up, down = block.ff.layers[0], block.ff.layers[2]
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        for parent, name, layer in (
            (block.att, "qkv", linear(*_with_norm(block.norm1, qkv.weight, qkv.bias))),
            (block.att, "out_proj", linear(out_proj.weight, out_proj.bias)),
            (block.ff.layers, "0", linear(*_with_norm(block.norm2, up.weight, up.bias))),
            (block.ff.layers, "2", linear(down.weight, down.bias)),
        ):
            setattr(parent, name, layer)
        block.norm1, block.norm2 = _without_gain(block.norm1), _without_gain(block.norm2)
    if not has_int8_kernel():
        head = linear
    model.out_head = head(*_with_norm(model.final_norm, model.head_weight, None))
    model.final_norm = _without_gain(model.final_norm)


def _with_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer ``x → weight @ (norm.weight * x + norm.bias) + bias``."""
    shift = weight.double() @ norm.bias.double()
    if bias is not None:
        shift += bias.double()
    return weight * norm.weight, shift.to(weight.dtype)


def _without_gain(norm: nn.LayerNorm) -> nn.LayerNorm:
    return nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
