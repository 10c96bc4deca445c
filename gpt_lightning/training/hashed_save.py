"""A checkpoint's file, whose SHA-256 is computed while it is written."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gpt_lightning.storage.direct_file import DirectFile

_SMALL = 1 << 20  # bytes


class _HashingFile:
    """File for ``torch.save`` whose SHA-256 is computed by a second thread meanwhile.

    Args:
        kept: Addresses of storages that do not change until the checksum is complete. Other data are copied if
            they are small (headers), or waited for (copies from a GPU).
    """

    def __init__(self, file: DirectFile, hasher: ThreadPoolExecutor, kept: frozenset[int]) -> None:
        self._file = file
        self._hasher = hasher
        self._kept = kept
        self._sum = hashlib.sha256()
        self._last_hash: Future[None] | None = None

    def write(self, data: Any) -> int:
        written = self._file.write(data)
        is_kept = np.frombuffer(data, np.uint8).ctypes.data in self._kept
        if not is_kept and written < _SMALL:
            data, is_kept = bytes(data), True
        self._last_hash = self._hasher.submit(self._sum.update, data)  # one thread: in this order
        if not is_kept:
            self._last_hash.result()
        return written

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        if self._last_hash is not None:
            self._last_hash.result()
        return self._sum.hexdigest()


def write_hashed(checkpoint: dict[str, Any], path: Path) -> str:
    """Write a new file with ``torch.save``, wait until it is on the disk, and return its SHA-256.

    Raises:
        OSError, RuntimeError: It cannot be written; torch hides some errors of the file in a ``RuntimeError``.
    """
    kept = frozenset(
        leaf.untyped_storage().data_ptr()
        for leaf in tree_leaves(checkpoint)
        if isinstance(leaf, Tensor) and leaf.device.type == "cpu"
    )
    with DirectFile(path) as file, ThreadPoolExecutor(max_workers=1) as hasher:
        hashing = _HashingFile(file, hasher, kept)
        try:
            torch.save(checkpoint, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:
            # torch ends its file after an interruption too, which fails
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise
        file.sync()
        return hashing.hexdigest()
