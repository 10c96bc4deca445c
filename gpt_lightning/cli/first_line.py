"""First line of ``fit``, logged before Lightning is imported, which takes seconds."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_lightning.cli.config_files import find_config
from gpt_lightning.cli.parsing import check_config_file
from gpt_lightning.cli.text_options import check_argument_texts, values_of
from gpt_lightning.cli.yaml_input import load_checked
from gpt_lightning.data.unicode import decode_text

logger = logging.getLogger(__name__)


def log_first_line(arguments: Sequence[str]) -> None:
    """Log which run starts or resumes, with which configurations.

    Raises:
        ValueError, OSError: A configuration cannot be read, or a text is not UTF-8; the message is one line.
    """
    check_argument_texts(arguments)
    names = values_of("--config", arguments) + values_of("-c", arguments)
    files = []
    settings: dict[str, Any] = {}
    for name in names:
        found = find_config(name)
        check_config_file(found)
        path = Path(os.path.expanduser(found))
        if path.is_file():
            settings |= load_checked(decode_text(path.read_bytes()), name)
            files.append(name)
    for setting in ("run", "ckpt_path", "init_from"):
        if given := values_of(f"--{setting}", arguments):
            settings[setting] = given[-1]
    logger.info(f"fit: {_describe(settings, files)}; starting PyTorch and Lightning")


def _describe(settings: dict[str, Any], files: list[str]) -> str:
    ckpt_path, source = settings.get("ckpt_path"), settings.get("init_from")
    run = f"run {settings['run']}" if settings.get("run") else "run"
    what = f"new {run}"
    if ckpt_path == "auto":
        what = f"{run}, new or resumed"
    elif ckpt_path:
        what = f"{run}, resumed from {ckpt_path}"
    elif source:
        what += f" from the weights of {source}"
    return what + (f", settings of {', '.join(files)}" if files else "")
