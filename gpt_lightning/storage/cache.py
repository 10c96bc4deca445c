"""The folder for what is downloaded or computed once on a machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``GPT_LIGHTNING_CACHE`` if it is set, otherwise ``~/.cache/gpt_lightning``.

    Raises:
        ValueError: The user has no home folder.
    """
    name = os.environ.get("GPT_LIGHTNING_CACHE") or "~/.cache/gpt_lightning"
    folder = os.path.expanduser(name)
    if folder.startswith("~/"):
        raise ValueError(
            f"GPT_LIGHTNING_CACHE: {name} cannot be found, the user has no home folder; set "
            "GPT_LIGHTNING_CACHE to a folder"
        )
    return Path(folder)
