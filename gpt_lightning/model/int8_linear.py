"""Linear layers with int8 weights, which make CPU inference faster. For inference only."""

import warnings

import torch
from torch import Tensor, nn

from gpt_lightning.model.gpt import GPTModel, TransformerBlock

# engines of torch's quantized operators whose activations are quantized while the product runs
_ENGINES = ("x86", "fbgemm")


class Int8Linear(nn.Module):
    """``nn.Linear``, ``(..., K)`` → ``(..., N)``, with weights and activations in 8 bits, and sums in 32 bits.

    Each row of the weights has a scale, so has each token's activation. The rest is float32.

    Args:
        weight: ``(N, K)``, float32.
        bias: ``(N,)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12).double() / 127
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():  # torch 2.13 has no other tensor that its kernel takes
            warnings.filterwarnings(
                "ignore", message="torch.quantize_per_tensor", category=UserWarning
            )
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = _engine()
        try:
            self.weight = torch.ops.quantized.linear_prepack(quantized, None)
        finally:
            torch.backends.quantized.engine = before
        # a copy: the bias may be a view of a mapped file, which may be overwritten
        self.bias = None if bias is None else bias.detach().clone()
        # without VNNI, products of two full 8-bit numbers may overflow the 16 bits in which a CPU adds pairs
        self.reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) == 1:
            y = torch.ops.quantized.linear_dynamic(rows, self.weight, self.reduce_range)
        else:  # torch has one scale for all tokens: each is scaled to the same maximum before
            scales = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
            y = torch.ops.quantized.linear_dynamic(rows / scales, self.weight, self.reduce_range)
            y = y.mul_(scales)
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.view(*x.shape[:-1], -1)


def _engine() -> str:
    return next(name for name in _ENGINES if name in torch.backends.quantized.supported_engines)


def int8_unsupported_reason(device: torch.device) -> str | None:
    """Why a device cannot compute with int8 weights; ``None`` if it can."""
    if device.type != "cpu":
        return f"int8 has no kernel for {device.type}"
    if not any(name in torch.backends.quantized.supported_engines for name in _ENGINES):
        return "int8 has no kernel for this CPU"
    return None


@torch.no_grad()
def quantize_int8(model: GPTModel) -> None:
    """Replace all matrices but the embeddings with :class:`Int8Linear`, in place. The model can no longer be trained.

    The gains and biases of the norms become part of the matrices after them. Otherwise channels with a large gain
    would take the 8 bits of the others.

    Args:
        model: In float32, on a CPU.
    """
    for block in model.trf_blocks:
        assert isinstance(block, TransformerBlock)
        up, down = block.ff.layers[0], block.ff.layers[2]
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        for parent, name, layer in (
            (block.att, "qkv", _after_norm(block.norm1, block.att.qkv.weight, block.att.qkv.bias)),
            (block.att, "out_proj", Int8Linear(block.att.out_proj.weight, block.att.out_proj.bias)),
            (block.ff.layers, "0", _after_norm(block.norm2, up.weight, up.bias)),
            (block.ff.layers, "2", Int8Linear(down.weight, down.bias)),
        ):
            setattr(parent, name, layer)
        block.norm1, block.norm2 = _without_gain(block.norm1), _without_gain(block.norm2)
    model.out_head = _after_norm(model.final_norm, model.head_weight, None)
    model.final_norm = _without_gain(model.final_norm)


def _after_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None) -> Int8Linear:
    """The layer ``x → weight @ (norm.weight * x + norm.bias) + bias``."""
    shift = weight.double() @ norm.bias.double()
    if bias is not None:
        shift += bias.double()
    return Int8Linear(weight * norm.weight, shift.to(weight.dtype))


def _without_gain(norm: nn.LayerNorm) -> nn.LayerNorm:
    return nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
