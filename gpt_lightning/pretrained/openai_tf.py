"""A TensorFlow checkpoint to a safetensors file and back, one variable at a time.

The only file that imports TensorFlow. ``openai.py`` runs it as a process:
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
    """All float variables of a checkpoint, under their names, as float32."""
    reader = tf.train.load_checkpoint(checkpoint)
    shapes = {
        name: [int(size) for size in shape]
        for name, shape in sorted(reader.get_variable_to_shape_map().items())
        if reader.get_variable_to_dtype_map()[name].is_floating
    }
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    # the format: the header's length in 8 bytes, the header, the tensors one after the other
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with target.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in shapes:
            file.write(np.ascontiguousarray(reader.get_tensor(name), dtype="<f4").tobytes())
        file.flush()
        os.fsync(file.fileno())


def write(source: Path, checkpoint: str) -> None:
    """The files ``.index`` and ``.data-00000-of-00001`` of a checkpoint with the file's tensors."""
    with safe_open(source, framework="np") as file:
        names = sorted(file.keys())
        tf.raw_ops.SaveV2(
            prefix=checkpoint,
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=[tf.constant(file.get_tensor(name)) for name in names],
        )


def main(act: str, source: str, target: str) -> int:
    try:
        if act == "read":
            read(source, Path(target))
        else:
            write(Path(source), target)
    except (tf.errors.OpError, OSError, ValueError, UnicodeDecodeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
