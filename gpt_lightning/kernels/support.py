"""Check whether a device can run our Triton kernels."""

import logging
from functools import cache
from importlib.util import find_spec

import torch

logger = logging.getLogger(__name__)


def kernels_unsupported_reason(device: torch.device) -> str | None:
    """Why ``device`` cannot run our Triton kernels; ``None`` if it can.

    They need an NVIDIA GPU of the Ampere generation or newer, and Triton, which is installed with torch
    for CUDA on Linux.
    """
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than NVIDIA's Ampere, or not NVIDIA's"
    return None


@cache
def log_unsupported_once(device_type: str, reason: str) -> None:
    """Log why a GPU runs torch's kernels instead of ours, once in a process. On other devices it is expected."""
    if device_type == "cuda":
        logger.info(f"kernels: {reason}, so torch's kernels run instead of this package's")
