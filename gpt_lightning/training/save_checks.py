"""Checks before the first step that a run can save: its folder, its last.ckpt, and the values in its checkpoint."""

import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.storage.atomic import replace, temporary_path
from gpt_lightning.training.checkpoint_io import (
    BEST,
    LAST,
    AtomicCheckpointIO,
    cause_of_failure,
    link_or_copy,
)

# exact types that torch.load(weights_only=True) restores; a numpy float is a subclass of float
_PRIMITIVES = {type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size}
_CONTAINERS = {dict, OrderedDict, Counter, list, tuple, set}


def check_saves(existing: Path) -> None:
    """Save a small checkpoint in a temporary folder in ``existing``, with each step of a real save.

    Raises:
        OSError: The folder or the system refuses a step; the message is the cause.
    """
    checkpoint: dict[str, Any] = {"hyper_parameters": {"config": {}}}
    try:
        # each process has its own: several runs may start in one folder
        with tempfile.TemporaryDirectory(prefix=".check-", dir=existing) as scratch:
            path = Path(scratch) / LAST
            path.touch()  # a file that the save replaces
            AtomicCheckpointIO().write(checkpoint, path)
            link_or_copy(path, path.with_name(BEST))
    except (OSError, RuntimeError) as error:
        raise OSError(cause_of_failure(error)) from error


def check_is_replaceable(path: Path) -> None:
    """Replace a file by a second name of itself, as a save replaces it.

    Raises:
        OSError: It is refused: on Windows while a program has the file open or mapped.
    """
    temporary = temporary_path(path)
    try:
        with suppress(OSError):  # a file system without hard links
            os.link(path, temporary)
        if temporary.exists():
            replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # replaced by itself, it keeps both names


def check_content(content: Any, key: str = "checkpoint") -> None:
    """Raise a ``ValueError`` with the key of a value that could not be loaded again: no tensor and no primitive."""
    kind = type(content)
    if isinstance(content, Tensor) or kind in _PRIMITIVES:
        return
    if kind not in _CONTAINERS:
        raise ValueError(
            f"{key}: is a {kind.__module__}.{kind.__qualname__}; a checkpoint holds tensors, numbers, "
            "strings and containers of them: convert it where the state is made"
        )
    if isinstance(content, Mapping):
        for name, value in content.items():
            check_content(name, f"a key of {key}")
            check_content(value, f"{key}.{name}")
    else:
        for i, value in enumerate(content):
            check_content(value, f"{key}.{i}")
