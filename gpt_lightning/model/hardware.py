"""Peak FLOP/s and memory of GPUs, from the vendors' data sheets."""

import re

# FLOP/s of dense 16-bit matrix products; the keys occur in torch's device names
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
OLDER_THAN_AMPERE = ("V100", "T4")  # without bfloat16
# a log line for a run or a text on Apple's GPUs
MPS_UNTRIED = (
    "mps: this package was never run on Apple's GPUs, only on a stand-in for MPS; give cpu if the results look "
    "wrong"
)
# bytes; of the A100, H100 and V100 the largest model. Vendors' GB are counted as 10⁹ bytes although they are
# GiB: CUDA itself and fragmentation take the difference of 7 %
MEMORY = {
    "B200": 180e9,
    "H200": 141e9,
    "H100 PCIe": 80e9,
    "H100 NVL": 94e9,
    "H100": 80e9,
    "A100": 80e9,
    "L40S": 48e9,
    "L4": 24e9,
    "A10": 24e9,
    "V100": 32e9,
    "T4": 16e9,
    "RTX 4090": 24e9,
    "RTX 3090": 24e9,
}

# words in a device name that stand for a smaller variant: "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
_SMALLER_VARIANT = re.compile(r"\b(MIG|NVL|Laptop|D)\b")


def gpu_value(table: dict[str, float], name: str) -> float | None:
    """Entry of ``table`` for torch's device name; ``None`` for an unknown device or a smaller variant.

    Whole words are compared, so an L40 is not an L4, and a MIG slice is not a full GPU.
    """
    key = next((key for key in table if re.search(rf"\b{key}\b", name)), None)
    if key is None or set(_SMALLER_VARIANT.findall(name)) - set(_SMALLER_VARIANT.findall(key)):
        return None
    return table[key]
