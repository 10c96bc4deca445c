"""Check of the logits of all steps, without waiting for a GPU in each one."""

import torch
from torch import Tensor

from gpt_lightning.generation.sampling import check_finite
from gpt_lightning.model.async_copy import AsyncHostCopy


class FiniteLogitsCheck:
    """Check that the logits are finite, every ``interval`` steps at once.

    The result of a check is copied to the host while the GPU computes the next ``interval`` steps, so the GPU
    does not wait for the host.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._first_step = 0
        self._max_logits: list[Tensor] = []  # one tensor per step that is not yet checked
        self._started: tuple[int, list[Tensor], AsyncHostCopy] | None = None

    def add(self, max_logits: Tensor, step: int) -> None:
        """Add the maximum logit of each row in this step. May raise as :meth:`check` does."""
        if self._interval == 1:
            _check_step(max_logits, step)
            return
        self._max_logits.append(max_logits)
        if step == 0:
            self.check()
        elif len(self._max_logits) == self._interval:
            self._finish()
            self._start()

    def check(self) -> None:
        """Check all steps so far; raises ``ValueError`` with the first step whose logits are not finite."""
        self._finish()
        if self._max_logits:
            self._start()
            self._finish()

    def _start(self) -> None:
        is_finite = torch.isfinite(torch.stack(self._max_logits)).all()
        self._started = self._first_step, self._max_logits, AsyncHostCopy(is_finite)
        self._first_step += len(self._max_logits)
        self._max_logits = []

    def _finish(self) -> None:
        started, self._started = self._started, None
        if started is None:
            return
        first_step, steps, is_finite = started
        if is_finite.read():
            return
        for step, max_logits in enumerate(steps, first_step):
            _check_step(max_logits, step)


def _check_step(max_logits: Tensor, step: int) -> None:
    try:
        check_finite(max_logits)
    except ValueError as error:
        raise ValueError(f"{error} (new token {step})") from error
