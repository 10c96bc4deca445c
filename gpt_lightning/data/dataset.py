"""Sliding windows over token ids, of one text or several, copied only when they are read.

L is the window length (the model's ``context_length`` unless asked otherwise), B the windows of a batch.
"""

import mmap
import sys
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gpt_lightning.data.sampler import Indices
from gpt_lightning.data.tokenizer import Ids
from gpt_lightning.storage.checksum import cached_sha256

_MAX_RESIDENT_BYTES = 32 << 20  # of mapped files, before their pages are freed
_FAULT_BYTES = 1 << 17  # that one page fault makes resident, at most


def window_count(tokens: int, length: int, stride: int) -> int:
    """Windows in a stream of ``tokens``."""
    return max(0, -(-(tokens - length) // stride))


class WindowDataset:
    """All windows of one stream of token ids, which may be stored in parts; nothing is copied until it is read.

    Window i starts at ``i * stride``; its inputs are the first L ids, its targets the last L. Like the
    book's dataset, the last window is the last that has a target for every input.

    Args:
        parts: Arrays of token ids that follow one another, in memory or memory-mapped. Of mapped files only a
            few pages are resident at a time.
        length: L.
        stride: Tokens from one window's start to the next.

    Attributes:
        max_resident_bytes: Of mapped files.
    """

    def __init__(self, parts: Sequence[Ids], length: int, stride: int) -> None:
        # slicing a memmap takes ten times as long
        self.parts = [np.asarray(part) for part in parts]
        self.length = length
        self.stride = stride
        self._itemsize = self.parts[0].itemsize
        self.tokens = sum(map(len, parts))
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._digests = [partial(_sha256, part) for part in parts]
        self._mapped = [mapped for part in parts if (mapped := _mapping(part)) is not None]
        self.max_resident_bytes = _MAX_RESIDENT_BYTES
        self._resident = 0
        # a view of a single part with a row for each start, without a copy
        single = len(self.parts) == 1 and len(self.parts[0]) > length
        self._rows = sliding_window_view(self.parts[0], length + 1) if single else None

    def __len__(self) -> int:
        return window_count(self.tokens, self.length, self.stride)

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, L + 1)``"""
        return len(self), self.length + 1

    @property
    def fingerprint(self) -> str:
        """A checksum over all tokens: of each part the length and the SHA-256."""
        checksum = sha256()
        for part, digest in zip(self.parts, self._digests, strict=True):
            checksum.update(f"{len(part)} {digest()}\n".encode())
        return checksum.hexdigest()

    def read(self, indices: Indices) -> NDArray[np.int64]:
        """The windows at ``indices``, ``(B, L + 1)``."""
        width = self.length + 1
        starts = indices * self.stride
        if self._rows is not None:
            windows = self._rows[starts].astype(np.int64)
            self._free_pages(len(indices) * (self._itemsize * width + _FAULT_BYTES))
            return windows
        windows = np.empty((len(indices), width), dtype=np.int64)
        parts = np.searchsorted(self._ends, starts, side="right")
        for row, part, start in zip(windows, parts.tolist(), starts.tolist(), strict=True):
            chunk = self.parts[part]
            begin = start - int(self._ends[part]) + len(chunk)
            chunk = chunk[begin : begin + width]
            if len(chunk) == width:
                row[:] = chunk
                continue
            filled = 0
            while True:  # it continues in the next parts
                row[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
                if filled == width:
                    break
                part += 1
                chunk = self.parts[part][: width - filled]
        self._free_pages(len(indices) * (self._itemsize * width + _FAULT_BYTES))
        return windows

    def _free_pages(self, newly_resident: int) -> None:
        """Free the mapped pages once there are many; the system's cache still has them."""
        self._resident += newly_resident
        if self._mapped and self._resident > self.max_resident_bytes:
            self._resident = 0
            for mapped in self._mapped:
                if sys.platform != "win32":  # there _mapping returns none
                    mapped.madvise(mmap.MADV_DONTNEED)


def _sha256(part: Ids) -> str:
    """Checksum of the tokens; that of a complete mapped file is computed once on a machine."""
    if isinstance(part, np.memmap) and part.filename is not None:
        path = Path(part.filename)
        if path.stat().st_size == part.nbytes:
            return cached_sha256(path)
    return sha256(np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<")).data).hexdigest()


def _mapping(part: Ids) -> mmap.mmap | None:
    """The memory map of a read-only ``part`` whose pages can be freed, else None."""
    if not (isinstance(part, np.memmap) and part.mode == "r" and hasattr(mmap, "MADV_DONTNEED")):
        return None
    base: Any = part
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.base
    return base


class ConcatWindowDataset:
    """The windows of several datasets, one dataset after the other. No window spans two of them."""

    def __init__(self, datasets: Sequence[WindowDataset]) -> None:
        self.datasets = datasets
        for dataset in datasets:
            dataset.max_resident_bytes = _MAX_RESIDENT_BYTES // len(datasets)
        self.tokens = sum(dataset.tokens for dataset in datasets)
        self._ends = np.cumsum([len(dataset) for dataset in datasets], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.datasets[0].shape[1]

    @property
    def fingerprint(self) -> str:
        """As :attr:`WindowDataset.fingerprint`."""
        return "+".join(dataset.fingerprint for dataset in self.datasets)

    def read(self, indices: Indices) -> NDArray[np.int64]:
        """As :meth:`WindowDataset.read`."""
        windows = np.empty((len(indices), self.shape[1]), dtype=np.int64)
        dataset_indices = np.searchsorted(self._ends, indices, side="right")
        for k in np.unique(dataset_indices):
            of_dataset = dataset_indices == k
            first = self._ends[k] - len(self.datasets[k])
            windows[of_dataset] = self.datasets[k].read(indices[of_dataset] - first)
        return windows
