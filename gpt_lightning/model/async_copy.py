"""Figures that the host reads once a GPU has computed them, without waiting for what it does meanwhile."""

import torch
from torch import Tensor


class AsyncHostCopy:
    """A tensor on its way to main memory; on a CPU it is there, and is that tensor itself."""

    def __init__(self, tensor: Tensor) -> None:
        self._here = tensor.to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """Waits for it alone, not for what was asked of the GPU since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._here
