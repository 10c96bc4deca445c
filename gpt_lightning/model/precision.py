"""Lightning's precision names and the dtypes that they stand for."""

import torch

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
