"""The table of peak FLOP rates of GPUs."""

import math

import torch

from gpt_lightning.model.cpu_peak import measured_peak
from gpt_lightning.model.hardware import PEAKS, gpu_value


def test_peak_rates_of_gpus_by_name() -> None:
    assert gpu_value(PEAKS, "NVIDIA H100 80GB HBM3") == 989e12
    assert gpu_value(PEAKS, "NVIDIA H100 PCIe") == 756e12
    assert gpu_value(PEAKS, "NVIDIA L4") == 121e12
    assert [
        gpu_value(PEAKS, f"NVIDIA {name}") for name in ("L40", "T400", "RTX A1000", "A10G")
    ] == [None] * 4
    assert gpu_value(PEAKS, "NVIDIA H100 NVL") == 835e12
    less = ["H200 NVL", "H100 80GB HBM3 MIG 1g.10gb", "H100 NVL MIG 1g.12gb", "A100-SXM4-40GB MIG 3g.20gb",
            "GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 D"]  # fmt: skip
    assert [gpu_value(PEAKS, f"NVIDIA {name}") for name in less] == [None] * len(less)
    assert PEAKS["H100"] == 989e12  # dense, not the sparse figure
    assert list(PEAKS).index("H100 PCIe") < list(PEAKS).index("H100")
    assert list(PEAKS).index("L40S") < list(PEAKS).index("L4")
    assert measured_peak(torch.float32, 256) > 1e6  # a busy machine is slow
    assert math.isfinite(measured_peak(torch.bfloat16, 256))
