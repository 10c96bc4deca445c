"""Configurations that the package brings along: ``--config NAME`` and ``--config configs/NAME.yaml`` work without a clone."""

import os
from collections.abc import Sequence
from pathlib import Path

import gpt_lightning

OPTIONS = ("--config", "-c")


def configs_folder() -> Path:
    """The folder of the configurations: in the installed package, or beside the package in a clone."""
    package = Path(gpt_lightning.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """The names of the configurations, in alphabetical order."""
    return sorted(path.stem for path in configs_folder().glob("*.yaml"))


def find_config(name: str) -> str:
    """The path of the configuration ``name``. A file that exists, or that names no configuration, is unchanged."""
    path = os.path.expanduser(name)
    if not os.path.exists(path) or os.path.isdir(path):
        for known in config_names():
            if name in (known, f"{known}.yaml", f"configs/{known}.yaml"):
                return str(configs_folder() / f"{known}.yaml")
    return name


def find_space(name: str) -> str:
    """The path of the space ``name`` of ``tune``. A file that exists, or that names no space, is unchanged."""
    known = configs_folder() / "spaces" / f"{Path(name).stem}.yaml"
    names = (known.stem, known.name, f"configs/spaces/{known.name}")
    is_known = name in names and known.is_file()
    return str(known) if is_known and not os.path.exists(name) else name


def with_config_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments with a path in place of each configuration's name."""
    found = []
    previous = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if previous in OPTIONS:
            found.append(find_config(argument))
        elif equals and option in OPTIONS:
            found.append(f"{option}={find_config(value)}")
        else:
            found.append(argument)
        previous = argument
    return found
