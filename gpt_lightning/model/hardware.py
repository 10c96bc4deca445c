"""Peak FLOP/s and memory of GPUs, from the makers' data sheets."""

import re

# dense 16-bit matrix products, FLOP/s, from the makers' data sheets; by what torch calls the device
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
OLDER_THAN_AMPERE = ("V100", "T4")
# bytes, from the same; the A100, H100 and V100 with most. Of the gibibytes that the makers sell as GB, 7 % are
# left out: CUDA itself and gaps take them
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

# a word in a device's name that makes it less than the card without: "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
_LESS = re.compile(r"\b(MIG|NVL|Laptop|D)\b")


def gpu_value(table: dict[str, float], name: str) -> float | None:
    """A table's entry by what torch calls the device, in whole words: an L40 is no L4, a slice no whole card."""
    key = next((key for key in table if re.search(rf"\b{key}\b", name)), None)
    if key is None or set(_LESS.findall(name)) - set(_LESS.findall(key)):
        return None
    return table[key]
