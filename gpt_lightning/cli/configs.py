"""``configs``: lists the configurations of the package, and copies one to be changed."""

import logging
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill

from gpt_lightning.cli.config_files import config_names, configs_folder
from gpt_lightning.cli.logs import OPTIONS_OF_EVERY_COMMAND
from gpt_lightning.storage.atomic import write_text
from gpt_lightning.suggestions import suggest

logger = logging.getLogger(__name__)

HELP = f"""usage: gpt_lightning configs list
       gpt_lightning configs copy NAME

list: the configurations that --config takes by name.
copy: writes NAME.yaml to the working directory, for your own changes. It overwrites nothing.

{OPTIONS_OF_EVERY_COMMAND}"""


def run(arguments: list[str]) -> None:
    """List the configurations of the package, or copy one."""
    match arguments:
        case [] | ["-h" | "--help", *_] | [_, "-h" | "--help"]:
            print(HELP)
        case ["list"]:
            _list()
        case ["copy", name]:
            _copy(name)
        case ["copy"]:
            raise ValueError(f"configs copy: needs a name; give one of {', '.join(config_names())}")
        case ["list" | "copy", *_, extra]:
            raise ValueError(f"configs: {extra} is one argument too many; leave it out")
        case [other, *_]:
            raise ValueError(f"configs: {other} is unknown; {suggest(other, ('list', 'copy'))}")


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
