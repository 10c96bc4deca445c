"""Asynchronous copies from a GPU to main memory: the host waits only when it reads the result."""

import torch
from torch import Tensor


class AsyncHostCopy:
    """Asynchronous copy of a tensor to main memory. A CPU tensor is returned as it is, without a copy."""

    def __init__(self, tensor: Tensor) -> None:
        self._host_tensor = tensor.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """The tensor on the host. Waits for this copy only, not for later work on the GPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host_tensor
