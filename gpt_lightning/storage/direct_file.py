"""A large file that is written without the page cache, where the system can."""

import mmap
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray

if sys.platform == "linux":
    import fcntl

BUFFER_SIZE = 8 << 20  # bytes; a multiple of the blocks of all disks


@final
class DirectFile:
    """A new file for data that nobody reads soon, such as a checkpoint. Only :meth:`sync` completes it.

    Linux writes it directly to the disk (``O_DIRECT``). The page cache would need new memory for each file, and a
    virtual machine may have to get that memory from its host, which can take longer than the disk. Where a file system
    or a system has no direct writes, they are ordinary ones.
    """

    def __init__(self, path: Path) -> None:
        # One is filled while a thread writes the other. Both begin at a page, as direct writes need it. Their memory is
        # shared: after a fork, a direct write of private memory may write something else (open(2)).
        self._buffer, self._other = (
            np.frombuffer(mmap.mmap(-1, BUFFER_SIZE), np.uint8) for _ in range(2)
        )
        self._buffered = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self._is_direct = False
        if sys.platform == "linux":
            with suppress(OSError):  # the attempt without O_DIRECT has the error, if it remains
                self._descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
                self._is_direct = True
        if not self._is_direct:
            self._descriptor = os.open(path, flags, 0o666)
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()
        os.close(self._descriptor)

    def write(self, data: Any) -> int:
        """Write contiguous bytes, or anything with the buffer protocol. Returns their number."""
        rest = np.frombuffer(data, np.uint8)
        size = len(rest)
        while len(rest):
            n = min(len(rest), BUFFER_SIZE - self._buffered)
            # NumPy copies without the GIL, for which the other thread would wait
            self._buffer[self._buffered : self._buffered + n] = rest[:n]
            self._buffered += n
            rest = rest[n:]
            if self._buffered == BUFFER_SIZE:
                self._wait()
                self._writing = self._writer.submit(self._write_now, self._buffer)
                self._buffer, self._other, self._buffered = self._other, self._buffer, 0
        return size

    def flush(self) -> None:
        """Nothing: :meth:`sync` writes what is in the buffer."""

    def sync(self) -> None:
        """Write the rest, and wait until the file is on the disk. Nothing can be written after it."""
        self._wait()
        self._leave_direct()  # the rest is not a multiple of a block
        self._write_now(self._buffer[: self._buffered])
        os.fsync(self._descriptor)
        # what went through the page cache leaves it
        if sys.platform == "linux" and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write_now(self, data: NDArray[np.uint8]) -> None:
        rest = data.data
        while len(rest):
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError:
                # the file system may take the flag but no direct write, or have larger blocks
                if not self._is_direct:
                    raise
                self._leave_direct()

    def _leave_direct(self) -> None:
        if sys.platform == "linux" and self._is_direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._is_direct = False
