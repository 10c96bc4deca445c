"""A large file that is written without the page cache, where the system can."""

import errno
import mmap
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray

if sys.platform == "linux":
    import fcntl

BUFFER_SIZE = 8 << 20  # bytes; a multiple of the blocks of all disks


@final
class DirectFile:
    """A new file for data that nobody reads soon, such as a checkpoint.

    Linux writes it from buffers here straight to the disk. Otherwise each file needs new memory in the page cache; in
    a virtual machine, which may have to get that memory from its host, this can take longer than the disk. File systems
    and systems without direct writes get ordinary ones.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self._is_direct = False
        if sys.platform == "linux":
            with suppress(OSError):  # the attempt without O_DIRECT has the error, if it remains
                self._descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
                self._is_direct = True
        if not self._is_direct:
            self._descriptor = os.open(path, flags, 0o666)
        # one is filled while a thread writes the other; both begin at a page, as direct writes must
        self._buffer, self._other = (
            np.frombuffer(mmap.mmap(-1, BUFFER_SIZE), np.uint8) for _ in range(2)
        )
        self._buffered = 0
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.shutdown()
        os.close(self._descriptor)

    def write(self, data: Any) -> int:
        """Write contiguous bytes, or anything with the buffer protocol. Returns their number."""
        rest = np.frombuffer(data, np.uint8)
        size = len(rest)
        while len(rest):
            n = min(len(rest), BUFFER_SIZE - self._buffered)
            self._buffer[self._buffered : self._buffered + n] = rest[:n]  # without Python's lock
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
        """Write the rest, and wait until the file is on the disk. This is the end of the file."""
        self._wait()
        self._leave_direct()  # the rest is no multiple of a block
        self._write_now(self._buffer[: self._buffered])
        os.fsync(self._descriptor)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write_now(self, data: NDArray[np.uint8]) -> None:
        rest = data.data
        while len(rest):
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                # the file system takes the flag but no direct write, or has larger blocks
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._leave_direct()

    def _leave_direct(self) -> None:
        if sys.platform == "linux" and self._is_direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._is_direct = False
