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

SETTINGS = ("run", "ckpt_path", "init_from")  # that the line names


def log_first_line(arguments: Sequence[str]) -> None:
    """Log which run starts or resumes, with which configurations.

    Raises:
        ValueError, OSError: A configuration cannot be read, or a text is not UTF-8; the message is one line.
    """
    check_argument_texts(arguments)
    files = []
    settings: dict[str, Any] = {}
    for name in values_of("--config", arguments, "-c"):
        found = find_config(name)
        check_config_file(found)
        path = Path(os.path.expanduser(found))
        if path.is_file():
            settings |= load_checked(decode_text(path.read_bytes()), name)
            files.append(name)
        else:  # YAML text, standard input or a pipe: only Lightning's parser reads it
            settings = dict.fromkeys(SETTINGS, "?")
    for setting in SETTINGS:
        if given := values_of(f"--{setting}", arguments):
            settings[setting] = None if given[-1] == "null" else given[-1]
    logger.info(f"fit: {_describe(settings, files)}; starting PyTorch and Lightning")


def _describe(settings: dict[str, Any], files: list[str]) -> str:
    run, ckpt_path, source = (settings.get(setting) for setting in SETTINGS)
    what = f"run {run}" if run not in (None, "?") else "run"
    if ckpt_path == "auto":
        what += ", new or resumed"
    elif ckpt_path not in (None, "?"):
        what += f", resumed from {ckpt_path}"
    elif ckpt_path is None and source != "?":
        what = f"new {what}" + (f" from the weights of {source}" if source else "")
    return what + (f", settings of {', '.join(files)}" if files else "")
