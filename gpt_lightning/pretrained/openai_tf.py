"""Converter between a TensorFlow checkpoint and a safetensors file.

This is the only file that imports TensorFlow. ``openai.py`` runs it as a process:
``python -m gpt_lightning.pretrained.openai_tf read|write SOURCE TARGET``.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from safetensors import safe_open


def read(checkpoint: str, target: Path) -> None:
    """Write all float variables of a checkpoint as float32, one at a time, to keep memory small."""
    reader = tf.train.load_checkpoint(checkpoint)
    shapes = {
        name: [int(size) for size in shape]
        for name, shape in sorted(reader.get_variable_to_shape_map().items())
        if reader.get_variable_to_dtype_map()[name].is_floating
    }
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    # the safetensors format: the length of the header in 8 bytes, the header, the tensors in order
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with target.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in shapes:
            file.write(np.ascontiguousarray(reader.get_tensor(name), dtype="<f4").tobytes())
        file.flush()
        os.fsync(file.fileno())


def write(source: Path, checkpoint: str) -> None:
    """Write a checkpoint's ``.index`` and ``.data-00000-of-00001`` with the tensors of ``source``."""
    with safe_open(source, framework="np") as file:
        names = sorted(file.keys())
        tf.raw_ops.SaveV2(
            prefix=checkpoint,
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=[tf.constant(file.get_tensor(name)) for name in names],
        )


def main(action: str, source: str, target: str) -> int:
    try:
        if action == "read":
            read(source, Path(target))
        else:
            write(Path(source), target)
    except (tf.errors.OpError, OSError, ValueError, UnicodeDecodeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
