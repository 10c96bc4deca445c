"""Lightning's messages: those that a user can act on are shown."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide Lightning's tips, and warnings that a user cannot act on.

    If the logger ``gpt_lightning`` has the level DEBUG, as with ``--verbose``, the tips are shown.
    """
    verbose = logging.getLogger("gpt_lightning").isEnabledFor(logging.DEBUG)
    level = logging.INFO if verbose else logging.WARNING
    levels = {
        "lightning.pytorch": level,
        "lightning.fabric": level,
        "lightning.pytorch.profilers": logging.INFO,  # a report that the user asked for
    }
    previous = [(logger := logging.getLogger(name), logger.level) for name in levels]
    for logger, old in previous:
        logger.setLevel(max(old, levels[logger.name]))  # a user may want even less
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
            # evaluation.eval_freq decides when metrics are logged
            warnings.filterwarnings("ignore", message=r".*smaller than the logging interval")
            yield
    finally:
        for logger, old in previous:
            logger.setLevel(old)
