"""Log handler that writes the package's messages to standard error while a command runs."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gpt_lightning.cli.launcher import COUNT_OF_RANK

QUIET_HELP = "only warnings, errors and results"
# the end of every complete help
OPTIONS_OF_EVERY_COMMAND = (
    f"Every command also takes --quiet ({QUIET_HELP}), --verbose (more messages, also Lightning's) and --debug "
    "(the traceback of an error)."
)


@contextmanager
def log_to_stderr(level: int) -> Iterator[None]:
    """Write the package's messages of ``level`` and above to the current ``sys.stderr``.

    Info messages have no prefix, a warning begins with ``gpt_lightning:``, an error with ``gpt_lightning: error:``.
    A Lightning profiler's report is shown at every level: it is the result that the user asked for. A Python
    program that uses the package without this function decides itself what to do with the messages.
    """
    handler = _StderrHandler()
    handler.setFormatter(_PrefixFormatter())
    levels = {"gpt_lightning": level, "lightning.pytorch.profilers": logging.INFO}
    previous = []
    for name, shown in levels.items():
        logger = logging.getLogger(name)
        previous.append((logger, logger.level, logger.propagate))
        logger.addHandler(handler)
        logger.setLevel(shown)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, old_level, old_propagate in previous:
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = old_propagate


class _PrefixFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.levelno >= logging.ERROR:
            return f"gpt_lightning: error: {message}"
        return f"gpt_lightning: {message}" if record.levelno >= logging.WARNING else message


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR and not _is_rank_zero():
            return
        # a name may have bytes that are not UTF-8, and a stream that Python did not open may refuse them
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        message = self.format(record).encode(encoding, "backslashreplace").decode(encoding)
        print(message, file=sys.stderr, flush=True)


def _is_rank_zero() -> bool:
    """Whether this process has rank 0; the other ranks only report errors."""
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    if lightning is None:  # the first variable that is set counts, as in Lightning
        return next((os.environ[name] for name in COUNT_OF_RANK if name in os.environ), "0") == "0"
    return bool(lightning.rank_zero_only.rank == 0)
