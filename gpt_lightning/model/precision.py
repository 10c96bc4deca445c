"""Lightning's precision names and the dtypes that they stand for, and devices without float64."""

import torch
from torch import Tensor

# types of devices that refuse float64 tensors
WITHOUT_FLOAT64 = ("mps",)

# name: (dtype of the weights, autocast dtype or None)
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "64-true": (torch.float64, None),
}
# the precisions that Lightning supports with FSDP2
SHARDED_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")


def has_float64(device: torch.device) -> bool:
    """Whether tensors on ``device`` can be float64; MPS refuses them."""
    return device.type not in WITHOUT_FLOAT64


def to_float64(tensor: Tensor) -> Tensor:
    """``tensor`` in float64: on its device, or on the host if the device has no float64."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()
