"""Muon: steps in the direction of the orthogonalized momentum, for the matrices of the blocks.

Sources: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon;
for ``match_rms_adamw`` Liu et al. 2025, arXiv:2502.16982, section 2.2.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from gpt_lightning.training.distributed import sharded_like

AdjustLR = Literal["original", "match_rms_adamw"]

# the polynomial a·x + b·x³ + c·x⁵ of the Newton–Schulz iteration, and how often it is applied
_A, _B, _C = 3.4445, -4.7750, 2.0315
NEWTON_SCHULZ_STEPS = 5


class Muon(AdamW):
    """Muon for the parameter groups that have ``chunks``, AdamW for all others.

    Differs from ``torch.optim.Muon`` in three points. It has AdamW's groups too, because a run has one optimizer. A
    parameter may be several matrices one below the other, such as query, key and value, which are orthogonalized
    one by one. The products run in ``product_dtype``.

    With FSDP2 every rank gathers a complete matrix at a time, orthogonalizes it and applies its rows.

    Keys of a group of Muon:
        chunks: Number of matrices in each parameter, of equal size, in the order of the rows.
        momentum: Decay rate of the momentum.
        adjust_lr: How the step's size follows from the matrix's shape, see :func:`lr_adjustment`.

    Args:
        groups: Parameter groups of both kinds; each gives lr and weight_decay.
        product_dtype: Type of the matrix products: bfloat16, float32 or float64.
        betas: Decay rates of AdamW's moments.
        fused: Whether AdamW's step is fused. Then ``found_inf``, if it is set to 1, keeps everything unchanged.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        product_dtype: torch.dtype,
        betas: tuple[float, float],
        fused: bool,
    ) -> None:
        self.product_dtype = product_dtype
        super().__init__(groups, betas=betas, fused=fused)

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimizer.__setstate__(self, state)  # AdamW's expects its moments of every parameter

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = self.param_groups
        for group in groups:
            if "chunks" in group:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrices(parameter, group)
        self.param_groups = [group for group in groups if "chunks" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _step_matrices(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum, buffer = group["momentum"], state["momentum_buffer"]
        weight: float | Tensor = 1 - momentum
        lr: float | Tensor = group["lr"]
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            gradient = torch.where(found_inf > 0, 0.0, gradient)
            weight, lr = weight * (1 - found_inf), lr * (1 - found_inf)
        buffer.lerp_(gradient, weight)
        # Nesterov's momentum
        update = _complete(gradient.lerp(buffer, momentum).to(self.product_dtype))
        matrices = update.view(group["chunks"], -1, update.shape[-1])
        rows, columns = matrices.shape[-2:]
        direction = orthogonalize(matrices).view(update.shape).to(parameter.dtype)
        parameter.mul_(1 - lr * group["weight_decay"])
        size = lr * lr_adjustment(group["adjust_lr"], rows, columns)
        parameter.sub_(sharded_like(parameter, direction.mul_(size)))


def _complete(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def lr_adjustment(adjust_lr: AdjustLR, rows: int, columns: int) -> float:
    """Factor of the learning rate for a matrix of this shape.

    Args:
        adjust_lr: ``original``: √(max(1, rows / columns)); ``match_rms_adamw``: 0.2·√(max(rows, columns)), with
            which an element changes as much as in a typical step of AdamW.
    """
    if adjust_lr == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace the singular values of each matrix by values near 1: ``(K, M, N)`` → ``(K, M, N)``.

    Five Newton–Schulz steps in the matrices' dtype; the singular values become about 0.7 to 1.2. A matrix of
    zeros stays one.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    X = matrices.mT if is_tall else matrices
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = X @ X.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        X = torch.baddbmm(X, polynomial, X, beta=_A)
    return X.mT if is_tall else X
