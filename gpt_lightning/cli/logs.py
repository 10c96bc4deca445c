"""The package's log messages on standard error, while a command runs."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def log_to_stderr(level: int) -> Iterator[None]:
    """Write the package's messages from ``level`` on to whatever ``sys.stderr`` is at the time.

    Information has no prefix, a warning begins with ``gpt_lightning:``, an error with ``gpt_lightning: error:``.
    A program that uses the package without this decides itself what it does with the messages.
    """
    logger = logging.getLogger("gpt_lightning")
    before = logger.level, logger.propagate
    handler = _Stderr()
    handler.setFormatter(_Formatter())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.levelno >= logging.ERROR:
            return f"gpt_lightning: error: {message}"
        return f"gpt_lightning: {message}" if record.levelno >= logging.WARNING else message


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR and not _is_rank_zero():
            return
        print(self.format(record), file=sys.stderr, flush=True)


def _is_rank_zero() -> bool:
    """Whether this is the one process, or the first of several: the others only report errors."""
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    return lightning is None or lightning.rank_zero_only.rank == 0
