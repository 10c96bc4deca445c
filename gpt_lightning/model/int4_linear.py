"""Linear layers with int4 weights, which make CPU inference faster. For inference only."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# neighbouring weights of a row with a scale and an offset of their own
from gpt_lightning.kernels.cpu_decode import GROUP

_ROWS_MULTIPLE = 16  # of the kernel
_REFITS = 4
_GROUPS_AT_ONCE = 2048  # rounded at once: they stay in the CPU's cache


class Int4Linear(nn.Module):
    """``nn.Linear``, ``(..., K)`` → ``(..., N)``, with weights in 4 bits, see :func:`round_to_int4`.

    Activations and results are rounded to bfloat16; products and sums are float32.

    Args:
        weight: ``(N, K)``, float32.
        bias: ``(N,)``.
        keep_codes: Whether to keep a copy of the weights for our C code, too.

    Attributes:
        shape: (N, K).
        codes: ``(N, K' / 2)``, uint8: 128 weights in 64 bytes, the first 64 in the low halves. K' is K, filled up to a
            multiple of two groups. ``None`` without ``keep_codes``.
        lines: ``(N, 2, K' / GROUP)``, bfloat16, the scales and then the offsets of the groups.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, keep_codes: bool = False) -> None:
        super().__init__()
        self.rows, columns = self.shape = (weight.shape[0], weight.shape[1])
        self.padding = -columns % GROUP
        padded = F.pad(weight.detach(), (0, self.padding, 0, -self.rows % _ROWS_MULTIPLE))
        codes, scales, offsets = round_to_int4(padded)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view_as(padded), 1)
        pairs = torch.stack((scales, offsets), dim=-1).view(len(padded), -1, 2)
        self.scales_and_offsets = pairs.transpose(0, 1).bfloat16().contiguous()  # (K / GROUP, N, 2)
        self.lines = self.codes = None
        if keep_codes:
            groups = pairs.shape[1]
            pair = F.pad(
                codes.view(-1, groups, GROUP)[: self.rows].to(torch.uint8), (0, 0, 0, groups % 2)
            ).view(self.rows, -1, 2, GROUP)
            self.codes = (pair[:, :, 0] | pair[:, :, 1] << 4).flatten(1)
            lines = pairs[: self.rows].transpose(1, 2).bfloat16()
            self.lines = F.pad(lines, (0, groups % 2)).contiguous()
        # a copy: the bias may be a view of a mapped file, which may be overwritten
        self.bias = None if bias is None else bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).bfloat16()
        if self.padding:
            rows = F.pad(rows, (0, self.padding))
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.contiguous(), self.weight, GROUP, self.scales_and_offsets
        )
        y = y[:, : self.rows].float()
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.view(*x.shape[:-1], -1)


def has_int4_kernel() -> bool:
    """Whether torch has a vectorized kernel for int4 weights on this CPU; its other one is very slow."""
    return sys.platform != "win32" and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def rounded_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A float32 layer with the weights of :class:`Int4Linear`, for CPUs without a kernel for int4."""
    rows, columns = weight.shape
    codes, scales, offsets = round_to_int4(F.pad(weight.detach(), (0, -columns % GROUP)))
    rounded = ((codes - 8) * scales + offsets).view(rows, -1)[:, :columns]
    with torch.device("meta"):
        layer = nn.Linear(columns, rows, bias=bias is not None)
    layer.weight = nn.Parameter(rounded.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def round_to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of each group with which ``weight ≈ (code - 8) * scale + offset``.

    The first line spans the range of the group. Then the codes, and the line with the least squares of errors, are
    computed in turn.

    Args:
        weight: float32; its rows are groups, one after the other.

    Returns:
        Codes from 0 to 15, ``(G, GROUP)``, int32; scales and offsets, ``(G, 1)``, float32 numbers that bfloat16 has.
    """
    parts = weight.reshape(-1, GROUP).split(_GROUPS_AT_ONCE)
    codes, scales, offsets = zip(*(_round_groups(part) for part in parts), strict=True)
    return torch.cat(codes), torch.cat(scales), torch.cat(offsets)


def _round_groups(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = _positive_bfloat16((high - low) / 15)
    offset = _bfloat16(low + 8 * scale)
    mean = groups.mean(dim=1, keepdim=True)
    for _ in range(_REFITS):
        codes = _codes(groups, scale, offset)
        mean_code = codes.mean(dim=1, keepdim=True)
        codes -= mean_code
        slope = (codes * groups).sum(dim=1, keepdim=True) / codes.square().sum(dim=1, keepdim=True)
        scale = torch.where(
            slope > 0, _positive_bfloat16(slope), scale
        )  # NaN if all codes are equal
        offset = _bfloat16(mean - mean_code * scale)
    return _codes(groups, scale, offset).add_(8).int(), scale, offset


def _codes(groups: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The codes minus 8, from -8 to 7."""
    return ((groups - offset) / scale).round_().clamp_(-8, 7)


def _bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _positive_bfloat16(x: Tensor) -> Tensor:
    return _bfloat16(x.clamp(min=1e-12))
