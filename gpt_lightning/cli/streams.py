"""Standard output and error that survive closed pipes, full disks and characters that they cannot encode.

Characters that a stream cannot encode are replaced by escapes. On a terminal, standard error also escapes control
characters, because a path or a prompt may contain any. A stream that cannot be written (a closed pipe, a full disk,
a closed descriptor) discards everything after the first failed write. Standard error never raises. Standard output
does not raise while a run trains; for every other command the output is the result, so the exit code reports the
error.
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


class StdoutErrors:
    """Record of the first error of standard output, or None."""

    def __init__(self) -> None:
        self.first: OSError | None = None

    def record_and_raise(self, error: OSError) -> None:
        self.first = error
        raise error


@contextmanager
def standard_streams(*, ignore_stdout_errors: bool) -> Iterator[StdoutErrors]:
    """Replace ``sys.stdout`` and ``sys.stderr`` until the end of the block.

    Args:
        ignore_stdout_errors: Whether an error of standard output is only a warning, for a command that trains.
    """
    _open_closed_descriptors()
    errors = StdoutErrors()
    previous = sys.stdout, sys.stderr
    sys.stderr = _wrap(sys.stderr, 2, lambda error: None)
    sys.stdout = _wrap(sys.stdout, 1, _warn if ignore_stdout_errors else errors.record_and_raise)
    try:
        yield errors
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = previous


class _RawOutput(io.RawIOBase):
    """Raw stream that discards everything after the first error of the stream below it."""

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
                if written is None:  # a non-blocking descriptor whose buffer is full
                    select.select([], [self._raw], [])
            except OSError as error:
                self._broken = True
                self._on_error(error)
            else:
                rest = rest[written or 0 :]
        return size


class _EscapedText(io.TextIOWrapper):
    """Standard error on a terminal, with control characters escaped. A progress bar writes to ``unescaped``."""

    def write(self, text: str) -> int:
        return super().write(printable(text))

    @property
    def unescaped(self) -> "_Unescaped":
        return _Unescaped(self)


class _Unescaped:
    """The same stream without escapes, for a progress bar, which moves the cursor."""

    def __init__(self, stream: _EscapedText) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return io.TextIOWrapper.write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _wrap(stream: TextIO | None, descriptor: int, on_error: Callable[[OSError], None]) -> Any:
    """The stream on top of :class:`_RawOutput`; a stream without a descriptor (in a notebook, a test) is unchanged."""
    if stream is None:  # the caller has closed it: a write to the descriptor reports that
        raw: Any = io.FileIO(descriptor, "w", closefd=False)
        closed: Any = _RawOutput(raw, on_error)
        return io.TextIOWrapper(io.BufferedWriter(closed), "utf-8", "backslashreplace")
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # python -u has no buffer
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(raw, io.RawIOBase):
        return stream
    stream.flush()
    output: Any = _RawOutput(raw, on_error)
    kind = _EscapedText if descriptor == 2 and stream.isatty() else io.TextIOWrapper
    return kind(
        output if raw is buffer else io.BufferedWriter(output),
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def is_closed_pipe(error: OSError) -> bool:
    """Whether nobody reads the stream any more, as behind ``| head``. Windows reports an invalid argument then."""
    return error.errno == errno.EPIPE or (os.name == "nt" and error.errno == errno.EINVAL)


def _warn(error: OSError) -> None:
    if not is_closed_pipe(error):
        logger.warning(f"standard output: cannot be written ({error.strerror}); training continues")


def _open_closed_descriptors() -> None:
    """Open /dev/null on closed standard descriptors.

    Otherwise the next file that is opened becomes standard output and receives what is printed. /dev/null is opened
    in the wrong direction, so that reading or writing still fails.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY if descriptor else os.O_WRONLY)
            os.set_inheritable(opened, True)
