"""Whether a GPU can run the kernels that are written here, in Triton: of the loss, and of decoding."""

from importlib.util import find_spec

import torch


def kernels_unsupported_reason(device: torch.device) -> str | None:
    """None where there is none: an NVIDIA GPU from Ampere on, and Triton, which comes with torch for CUDA on Linux."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than NVIDIA's Ampere, or not NVIDIA's"
    return None
