"""How far bytes have come, on stderr: bars on a terminal, else whoever works prints a line now and then."""

import logging
import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


def byte_progress() -> Progress:
    """Disabled where stderr is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=Console(file=getattr(sys.stderr, "unescaped", sys.stderr)),
        disable=not sys.stderr.isatty() or not logger.isEnabledFor(logging.INFO),
    )
