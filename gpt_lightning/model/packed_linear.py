"""Weights in the order in which a CPU's matrix products read them fastest: for inference only."""

import torch
from torch import Tensor, nn

from gpt_lightning.model.gpt import GPTModel

MIN_PACKED_SHAPE = (
    1 << 19
)  # weights of a layer: a call of oneDNN's takes 50 µs more than one of torch's own product


class PackedLinear(nn.Module):
    """``nn.Linear`` ``(..., K)`` → ``(..., N)`` over weights in oneDNN's blocked layout.

    The operators are those that torch's own compiler packs frozen models with; they take no part in
    autograd, and the packed weights are no part of a state dict.

    Args:
        weight: ``(N, K)``.
        bias: ``(N,)``.
        gelu: Whether GPT-2's GELU (its tanh form) follows, computed while the result is in the cache.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.bias = None if bias is None else bias.detach()
        self._after: tuple[str, list[float], str] = (
            ("gelu", [], "tanh") if gelu else ("none", [], "")
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self._after)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for it: none for bfloat16 without AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        PackedLinear(torch.zeros(8, 8, dtype=dtype), None)
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def pack_weights(model: GPTModel) -> bool:
    """Replace every large linear layer by a :class:`PackedLinear`, in place; afterwards the model only infers.

    Decoding reads all weights for each token: on a CPU this is up to twice as fast, for the same logits
    to rounding (benchmarks/generation.py). A layer's own weights go as its packed ones come; the head of
    a tied model gets weights of its own, as the embedding stays.

    Returns:
        Whether any was: not on a GPU, nor for a dtype that :func:`can_pack` refuses.
    """
    weight = model.tok_emb.weight
    if weight.device.type != "cpu" or not can_pack(weight.dtype):
        return False
    large = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and child.weight.numel() >= MIN_PACKED_SHAPE
    ]
    for parent, name in large:
        child = getattr(parent, name)
        before_gelu = isinstance(parent, nn.Sequential) and name == "0"
        setattr(parent, name, PackedLinear(child.weight, child.bias, gelu=before_gelu))
        if before_gelu:
            setattr(parent, "1", nn.Identity())  # what follows it in a Sequential
        del child  # the last that holds its weights
    if model.out_head is None and weight.numel() >= MIN_PACKED_SHAPE:
        model.out_head = PackedLinear(weight, None)
        return True
    return bool(large)
