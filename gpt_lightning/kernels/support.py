"""Check whether a device can run our Triton kernels."""

from importlib.util import find_spec

import torch


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
