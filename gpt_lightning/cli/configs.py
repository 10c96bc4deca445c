"""``configs``: lists the configurations of the package, and copies one to be changed."""

import logging
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import Literal

from jsonargparse import ArgumentParser

from gpt_lightning.cli.config_files import config_names, configs_folder
from gpt_lightning.cli.parsing import parse
from gpt_lightning.storage.atomic import write_text
from gpt_lightning.suggestions import suggest

logger = logging.getLogger(__name__)

Action = Literal["list", "copy"]


def run(arguments: list[str]) -> None:
    """List the configurations that --config takes by name, or copy one to the working directory as NAME.yaml."""
    settings = parse(_parser(), arguments)
    if settings.action == "list":
        if settings.name is not None:
            raise ValueError(
                f"configs list: {settings.name} is one argument too many; leave it out"
            )
        _list()
    elif settings.name is None:
        raise ValueError(f"configs copy: needs a name; give one of {', '.join(config_names())}")
    else:
        _copy(settings.name)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gpt_lightning configs", description=run.__doc__, exit_on_error=False
    )
    parser.add_argument("action", type=Action, help="list or copy.")
    parser.add_argument(
        "name", nargs="?", help="Which configuration is copied; nothing is overwritten."
    )
    return parser


def _list() -> None:
    names = config_names()
    width = max(map(len, names)) + 2
    for name in names:
        first, *_ = (configs_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        line = f"{name:<{width}}{first.removeprefix('# ')}"
        print(fill(line, get_terminal_size().columns, subsequent_indent=" " * width))


def _copy(name: str) -> None:
    name = name.removesuffix(".yaml")
    if name not in config_names():
        raise ValueError(f"{name}: is not a configuration; {suggest(name, config_names())}")
    dest = Path(f"{name}.yaml")
    if dest.exists():
        raise FileExistsError(f"{dest}: exists; move it, or use it with --config {dest}")
    write_text(dest, (configs_folder() / dest).read_text(encoding="utf-8"))
    logger.info(f"{dest}: written; use it with --config {dest}")
