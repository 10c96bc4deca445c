"""Windows over token ids, in one stream or several, drawn where they are asked for.

L is the window length (the model's ``context_length`` unless asked otherwise), B the windows of a batch.
"""

import mmap
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gpt_lightning.data.sampler import Indices
from gpt_lightning.storage.checksum import cached_sha256

_MAX_RESIDENT_BYTES = 32 << 20  # bytes of mapped files, before their pages are let go
_FAULT = 1 << 17  # bytes that the first look at a page makes resident, at most


def window_count(tokens: int, length: int, stride: int) -> int:
    """Of a stream of ``tokens``."""
    return max(0, -(-(tokens - length) // stride))


class WindowDataset:
    """All windows of one stream of token ids, which may be cut into parts; nothing is copied until it is drawn.

    Window i starts at ``i * stride``; its inputs are the first L ids, its targets the last L. Like the
    book's dataset, the last start is the last that leaves a target for every input.

    Args:
        parts: Arrays of token ids that follow one another, in memory or memory-mapped. Of a mapped file a few
            pages are resident at a time.
        length: L.
        stride: Tokens from one window's start to the next.

    Attributes:
        most_resident: Bytes of mapped files, at most.
    """

    def __init__(self, parts: Sequence[NDArray[np.uint16]], length: int, stride: int) -> None:
        # to slice a memmap takes ten times as long
        self.parts = [np.asarray(part) for part in parts]
        self.length = length
        self.stride = stride
        self.tokens = sum(map(len, parts))
        self._ends = np.cumsum([len(part) for part in parts])
        self._digests = [partial(_sha256, part) for part in parts]
        self._mapped = [found for part in parts if (found := _mapping(part)) is not None]
        self.most_resident = _MAX_RESIDENT_BYTES
        self._resident = 0
        # of a single part, each stretch of its tokens as a row, without a copy
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
        found = sha256()
        for part, digest in zip(self.parts, self._digests, strict=True):
            found.update(f"{len(part)} {digest()}\n".encode())
        return found.hexdigest()

    def draw(self, numbers: Indices) -> NDArray[np.int64]:
        """The numbered windows, ``(B, L + 1)``."""
        width = self.length + 1
        starts = numbers * self.stride
        if self._rows is not None:
            drawn = self._rows[starts].astype(np.int64)
            self._let_go(len(numbers) * (2 * width + _FAULT))
            return drawn
        drawn = np.empty((len(numbers), width), dtype=np.int64)
        parts = np.searchsorted(self._ends, starts, side="right")
        for row, part, start in zip(drawn, parts.tolist(), starts.tolist(), strict=True):
            piece = self.parts[part]
            begin = start - int(self._ends[part]) + len(piece)
            piece = piece[begin : begin + width]
            if len(piece) == width:
                row[:] = piece
                continue
            filled = 0
            while True:  # it goes on in the parts that follow
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                if filled == width:
                    break
                part += 1
                piece = self.parts[part][: width - filled]
        self._let_go(len(numbers) * (2 * width + _FAULT))
        return drawn

    def _let_go(self, looked_at: int) -> None:
        """Of mapped pages, once there are many; the system's cache still has them."""
        self._resident += looked_at
        if self._mapped and self._resident > self.most_resident:
            self._resident = 0
            for mapped in self._mapped:
                mapped.madvise(mmap.MADV_DONTNEED)


def _sha256(part: NDArray[np.uint16]) -> str:
    """Of the tokens; of a whole mapped file the file's, which is computed once on a machine."""
    if isinstance(part, np.memmap) and part.filename is not None:
        path = Path(part.filename)
        if path.stat().st_size == part.nbytes:
            return cached_sha256(path)
    return sha256(np.ascontiguousarray(part, dtype="<u2").data).hexdigest()


def _mapping(part: NDArray[np.uint16]) -> mmap.mmap | None:
    """The mapped file that ``part`` only reads, where there is one whose pages can be let go."""
    if not (isinstance(part, np.memmap) and part.mode == "r" and hasattr(mmap, "MADV_DONTNEED")):
        return None
    base: Any = part
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.base
    return base


class ConcatWindowDataset:
    """The windows of several sources, numbered one source after the other. None reaches from one into the next."""

    def __init__(self, sources: Sequence[WindowDataset]) -> None:
        self.sources = sources
        for source in sources:
            source.most_resident = _MAX_RESIDENT_BYTES // len(sources)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.sources[0].shape[1]

    @property
    def fingerprint(self) -> str:
        """As :attr:`WindowDataset.fingerprint`."""
        return "+".join(source.fingerprint for source in self.sources)

    def draw(self, numbers: Indices) -> NDArray[np.int64]:
        """As :meth:`WindowDataset.draw`."""
        drawn = np.empty((len(numbers), self.shape[1]), dtype=np.int64)
        sources = np.searchsorted(self._ends, numbers, side="right")
        for k in np.unique(sources):
            own = sources == k
            first = self._ends[k] - len(self.sources[k])
            drawn[own] = self.sources[k].draw(numbers[own] - first)
        return drawn
