"""Linear layers with int8 weights, which make CPU inference faster. For inference only."""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_lightning.kernels.cpu_decode import GROUP

# engines of torch's quantized operators whose activations are quantized while the product runs
_ENGINES = ("x86", "fbgemm")


class Int8Linear(nn.Module):
    """``nn.Linear``, ``(..., K)`` → ``(..., N)``, with weights and activations in 8 bits, and sums in 32 bits.

    Each row of the weights has a scale, so has each token's activation. The rest is float32.

    Args:
        weight: ``(N, K)``, float32.
        bias: ``(N,)``.
        keep_codes: Whether to keep a copy of the weights for our C code, too.

    Attributes:
        shape: (N, K).
        codes: ``(N, K')``, uint8, with weight = (code - 128) * scale; K' is K, filled up to a multiple of two groups.
            ``None`` without ``keep_codes``.
        scales: ``(N,)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, keep_codes: bool = False) -> None:
        super().__init__()
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        weight = weight.detach()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12).double() / 127
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():  # torch 2.13 has no other tensor that its kernel takes
            warnings.filterwarnings(
                "ignore", message="torch.quantize_per_tensor", category=UserWarning
            )
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.scales, self.codes = scales.float(), None
        if keep_codes:
            codes = (quantized.int_repr().view(torch.uint8) ^ 128).contiguous()
            self.codes = F.pad(codes, (0, -weight.shape[1] % (2 * GROUP)), value=128)
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
        if len(rows) == 1 and math.isfinite(rows.sum().item()):
            y = torch.ops.quantized.linear_dynamic(rows, self.weight, self.reduce_range)
        else:  # torch has one scale for all tokens: each is scaled to the same maximum before
            scales = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
            # the kernel takes NaN for some number; the scale of a token with NaN is NaN, and so is its result
            scaled = (rows / scales).nan_to_num_()
            y = torch.ops.quantized.linear_dynamic(scaled, self.weight, self.reduce_range)
            y = y.mul_(scales)
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


def _engine() -> str:
    return next(name for name in _ENGINES if name in torch.backends.quantized.supported_engines)


def has_int8_kernel() -> bool:
    """Whether torch has a kernel for int8 weights and activations on this CPU."""
    return any(name in torch.backends.quantized.supported_engines for name in _ENGINES)
