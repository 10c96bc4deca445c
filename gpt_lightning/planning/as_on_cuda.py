"""Torch's functions as a GPU computes them, on tensors of a CPU that have no content: for counting alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_lightning.model import gpt
from gpt_lightning.model import loss as of_loss


@contextmanager
def as_on_cuda(low: torch.dtype | None, *, loss_kernel: bool) -> Iterator[None]:
    """What a GPU keeps where a CPU keeps something else, for which torch's functions are exchanged meanwhile.

    Its dropout keeps a bool a value, its fast attention has dropout inside and keeps no (T, T), and its
    autocast computes norms in float32. Of the loss it casts the last part alone: the logarithm of the softmax
    is in the logits' type and kept, and so is its copy in float32, of which the loss is the mean.

    Args:
        low: What autocast computes in; none: there is no autocast.
        loss_kernel: Whether a chunk's loss is one kernel, which makes the gradient of the logits themselves.
    """

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if p and training else x

    def attention(*args: Any, **settings: Any) -> Tensor:
        return before["scaled_dot_product_attention"](*args, **{**settings, "dropout_p": 0.0})

    def layer_norm(x: Tensor, *args: Any, **settings: Any) -> Tensor:
        def cast(value: Any) -> Any:
            return value.float() if isinstance(value, Tensor) and value.dtype == low else value

        return before["layer_norm"](
            cast(x), *map(cast, args), **{key: cast(value) for key, value in settings.items()}
        )

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.nll_loss(torch.log_softmax(logits, -1, dtype=logits.dtype).float(), targets)

    def of_chunk(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.empty(len(logits), dtype=torch.float32, device=logits.device).sum()

    before = {name: getattr(F, name) for name in ("dropout", "scaled_dot_product_attention",
                                                  "layer_norm", "cross_entropy")}  # fmt: skip
    now: dict[str, Callable[..., Tensor]] = {
        "dropout": dropout,
        "scaled_dot_product_attention": attention,
    }
    if low is not None:
        now |= {"layer_norm": layer_norm, "cross_entropy": loss}
    for name, function in now.items():
        setattr(F, name, function)
    products, gpt._products_are_faster = gpt._products_are_faster, lambda q: False
    kernel = of_loss._kernel
    setattr(of_loss, "_kernel", lambda device: of_chunk if loss_kernel else None)  # noqa: B010
    try:
        yield
    finally:
        gpt._products_are_faster = products
        setattr(of_loss, "_kernel", kernel)  # noqa: B010
        for name, function in before.items():
            setattr(F, name, function)
