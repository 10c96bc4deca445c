"""Standard output and standard error that cannot end a command by surprise.

Characters that a stream cannot encode are replaced by escapes, and on a terminal standard error shows control
characters as escapes: a path or a prompt may hold any. A stream that cannot be written (a reader that
has gone, a full disk, a closed descriptor) discards everything after the first failed write. Standard error never
raises. Standard output never raises while a run trains; for every other command the result is lost, and the exit
code says so.
"""

import errno
import io
import logging
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from gpt_lightning.data.unicode import printable

logger = logging.getLogger(__name__)


class LostOutput:
    """What standard output could not take: the first error, or None."""

    def __init__(self) -> None:
        self.error: OSError | None = None

    def keep(self, error: OSError) -> None:
        self.error = error
        raise error


@contextmanager
def standard_streams(*, run_goes_on: bool) -> Iterator[LostOutput]:
    """Replace ``sys.stdout`` and ``sys.stderr`` until the end of the block.

    Args:
        run_goes_on: Whether an error of standard output is only a warning, for a command that trains.
    """
    _fill_closed_descriptors()
    lost = LostOutput()
    before = sys.stdout, sys.stderr
    sys.stderr = _tolerant(sys.stderr, 2, lambda error: None)
    sys.stdout = _tolerant(sys.stdout, 1, _warn if run_goes_on else lost.keep)
    try:
        yield lost
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _Output(io.RawIOBase):
    """Bytes to a raw stream. After the first error it discards what it gets."""

    def __init__(self, raw: Any, on_error: Callable[[OSError], None]) -> None:
        self._raw = raw
        self._on_error = on_error
        self._broken = False
        self.name = raw.name

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return bool(self._raw.isatty())

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest and not self._broken:
            try:
                written = self._raw.write(rest)
                if written is None:  # a non-blocking descriptor that takes nothing now
                    select.select([], [self._raw], [])
            except OSError as error:
                self._broken = True
                self._on_error(error)
            else:
                rest = rest[written or 0 :]
        return size


class _Messages(io.TextIOWrapper):
    """Standard error on a terminal. A progress bar draws on ``unescaped``."""

    def write(self, text: str) -> int:
        return super().write(printable(text))

    @property
    def unescaped(self) -> "_Unescaped":
        return _Unescaped(self)


class _Unescaped:
    """A stream of messages, for what moves the cursor."""

    def __init__(self, messages: _Messages) -> None:
        self._messages = messages

    def write(self, text: str) -> int:
        return io.TextIOWrapper.write(self._messages, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._messages, name)


def _tolerant(stream: TextIO | None, descriptor: int, on_error: Callable[[OSError], None]) -> Any:
    """The same stream over :class:`_Output`; one that is not over a descriptor (a notebook's, a test's) stays."""
    if stream is None:  # the caller has closed it: writing to the descriptor says so
        raw: Any = io.FileIO(descriptor, "w", closefd=False)
        closed: Any = _Output(raw, on_error)
        return io.TextIOWrapper(io.BufferedWriter(closed), "utf-8", "backslashreplace")
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with python -u there is no buffer between
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(raw, io.RawIOBase):
        return stream
    stream.flush()
    output: Any = _Output(raw, on_error)
    kind = _Messages if descriptor == 2 and stream.isatty() else io.TextIOWrapper
    return kind(
        output if raw is buffer else io.BufferedWriter(output),
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _warn(error: OSError) -> None:
    if error.errno != errno.EPIPE:  # a reader that goes has read enough
        logger.warning(f"standard output: cannot be written ({error.strerror}); training continues")


def _fill_closed_descriptors() -> None:
    """Else the next file that is opened becomes standard output, and gets what is printed.

    /dev/null is opened in the wrong direction, so that reading or writing still fails.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY if descriptor else os.O_WRONLY)
            os.set_inheritable(opened, True)
