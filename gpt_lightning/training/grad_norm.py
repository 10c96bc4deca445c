"""Norm of all gradients."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gpt_lightning.training.distributed import local

_BLOCK = 1024  # elements whose squares float32 sums accurately


def _norm_on_cpu(parts: list[Tensor]) -> Tensor:
    """Compute the norms of blocks of 1024 elements, then the norm of these norms and of the remaining elements."""
    norms: list[Tensor] = []
    for part in parts:
        elements = part if part.ndim == 1 else part.flatten()
        if full := part.numel() // _BLOCK * _BLOCK:
            dtype = torch.promote_types(part.dtype, torch.float32)
            blocks = elements[:full].view(-1, _BLOCK)
            norms.append(torch.linalg.vector_norm(blocks, dim=-1, dtype=dtype))
            elements = elements[full:]
        norms.append(elements)
    return torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64)


def global_grad_norm(gradients: list[Tensor], *, by_blocks: bool = True) -> Tensor:
    """Return the 2-norm over all gradients: a scalar in float32, or float64 for float64 gradients.

    With sharded gradients it is the norm of the full ones; all ranks must call it. On a CPU it is computed by
    blocks: torch sums the squares of a tensor in float32, which makes the norm of the 124M model's embedding
    0.3 % too small, and differs between a tensor and its shards.

    Args:
        by_blocks: ``False``: the norm of ``torch.nn.utils.clip_grad_norm_``, also on a CPU.
    """
    first = gradients[0] if gradients else None
    parts = [local(g) for g in gradients] if isinstance(first, DTensor) else gradients
    on_cpu = by_blocks and bool(parts) and parts[0].device.type == "cpu"
    norm = _norm_on_cpu(parts) if on_cpu else nn.utils.get_total_norm(parts)
    if isinstance(first, DTensor):
        squares = norm.double().square()
        dist.all_reduce(squares, group=first.device_mesh.get_group())
        norm = squares.sqrt()
    precise = torch.float32 if first is None else torch.promote_types(first.dtype, torch.float32)
    return norm.to(precise)


_MAX_CERTAINLY_FINITE = (
    1e15  # squares of smaller elements, and their sum, are far below float32's maximum
)


def norm_is_certainly_finite(gradients: list[Tensor]) -> bool:
    """Return whether no element is NaN or so large that the norm could overflow; faster than the norm on a CPU."""
    return all(
        low.item() > -_MAX_CERTAINLY_FINITE and high.item() < _MAX_CERTAINLY_FINITE
        for low, high in map(torch.aminmax, filter(torch.numel, gradients))
    )
