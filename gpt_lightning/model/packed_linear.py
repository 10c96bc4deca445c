"""Linear layers with packed weights, which make CPU inference faster. For inference only."""

import torch
from torch import Tensor, nn

from gpt_lightning.model.gpt import GPTModel

# minimum number of weights of a packed layer: an oneDNN call costs 50 µs more than torch's own product
MIN_PACKED_WEIGHTS = 1 << 19


class PackedLinear(nn.Module):
    """``nn.Linear``, ``(..., K)`` → ``(..., N)``, with its weights in oneDNN's blocked layout.

    It uses the operators with which torch's compiler packs frozen models. They do not support
    autograd, and the packed weights are not in the state dict.

    Args:
        weight: ``(N, K)``.
        bias: ``(N,)``.
        gelu: Whether to apply GPT-2's GELU (tanh approximation) in the same operator, while the result
            is still in the CPU's cache.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        # a copy: the bias may be a view of a mapped file, which may be overwritten
        self.bias = None if bias is None else bias.detach().clone()
        self._activation: tuple[str, list[float], str] = (
            ("gelu", [], "tanh") if gelu else ("none", [], "")
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self._activation)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN can pack weights of ``dtype`` on this CPU; bfloat16 needs AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        PackedLinear(torch.zeros(8, 8, dtype=dtype), None)
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def pack_weights(model: GPTModel) -> bool:
    """Replace every large linear layer with a :class:`PackedLinear`, in place. The model can no longer be trained.

    Decoding reads all weights for each token. On a CPU it is up to twice as fast with packed weights, and the
    logits are equal up to rounding (benchmarks/generation.py). The original weights of each layer are freed
    as it is packed. The head of a tied model becomes a packed copy, because the embedding is still needed.

    Returns:
        Whether any layer was packed. None is on a GPU, or if :func:`can_pack` is False for the dtype.
    """
    weight = model.tok_emb.weight
    if weight.device.type != "cpu" or not can_pack(weight.dtype):
        return False
    large_layers = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and child.weight.numel() >= MIN_PACKED_WEIGHTS
    ]
    for parent, name in large_layers:
        child = getattr(parent, name)
        has_gelu = isinstance(parent, nn.Sequential) and name == "0"
        setattr(parent, name, PackedLinear(child.weight, child.bias, gelu=has_gelu))
        if has_gelu:
            setattr(parent, "1", nn.Identity())  # the GELU is part of the packed layer
        del child  # the last reference to the original weights
    if model.out_head is None and weight.numel() >= MIN_PACKED_WEIGHTS:
        model.out_head = PackedLinear(weight, None)
        return True
    return bool(large_layers)
