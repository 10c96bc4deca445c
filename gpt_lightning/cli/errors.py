"""Translation of jsonargparse's errors into one line of the form WHAT: CAUSE; REMEDY."""

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from textwrap import shorten
from typing import Any, get_args

from gpt_lightning.suggestions import nearest, nearest_setting

_NOT_ALLOWED = re.compile(r"Importing '(?P<path>[\w.]+)' is not allowed")
_UNKNOWN = [
    re.compile(r"unrecognized arguments: (?P<key>--?[^\s=]+)"),
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'"),
    re.compile(r"[Oo]ption '(?P<key>[^']+)' is not accepted"),
]
_REQUIRED = re.compile(r"the following arguments are required: (?P<names>[\w, ]+)")
_AT_KEY = re.compile(r'Parser key "(?P<key>[^"]+)"(?: element \d+)?:\s*(?P<cause>.*)', re.DOTALL)
_IN_CLASS = re.compile(
    r"Problem with given class_path '(?P<name>[^']+)':\s*(?P<cause>.*?)"
    r"(?=\n\s*- (?:Problem|Not a valid|Expected)|\n\s*Given value|$)",
    re.DOTALL,
)
_EXPECTED = re.compile(
    r"Expected (?:an? )?(?:<class '(?P<type>[\w.]+)'>|typing\.Literal\[(?P<choices>[^\]]*)\]"
    r"|tuple with (?P<length>\d+) elements)"
)
_GIVEN = re.compile(r"(?P<which>Got value|Given value): (?P<value>.*)")
_NO_IMPORT_PATH = re.compile(r"Expected a dot import path string: (?P<name>.*)")
_NO_ATTRIBUTE = re.compile(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'")
_REQUIREMENT = re.compile(r"Requirement '(?P<name>[^']+)' not met")
# message of jsonargparse → our message
_MESSAGES = {
    r"unrecognized arguments: (?P<word>\S+)": "{word}: is not an option; write options as --NAME VALUE, and text in quotes",
    r"argument (?:-\w/)?--(?P<key>[^\s:]+): expected (?:one|at least one)": "{key}: has no value; give one after --{key}",
    r"argument --(?P<key>\w+): invalid int value: '(?P<value>.*)'": "{key}: {value} is not a whole number; give one",
    r"argument (?:-\w/)?--(?P<key>[^\s:]+): ignored explicit": "{key}: takes no value; give --{key} alone",
    r"Unexpected config: (?P<text>.{,60})": "config: {text} is not a mapping of settings; give lines such as 'run: NAME'",
    r"Key must be a string, got: (?P<key>.*?)\.?$": "{key}: is not the name of a setting; if it is a name, put it in quotes",
    r"Subclasses are disabled for (?P<wanted>\w+), thus '(?P<given>[^']+)'": "{given}: is not a {wanted}; leave class_path out",
    r"Config file loop detected: (?P<chain>.*)": "config: {chain} is a loop; remove the file that reads itself",
}

# name of a type → what it is in plain words, remedy
_TYPES = {
    "int": ("a whole number", "give one"),
    "float": ("a number", "give one"),
    "bool": ("true or false", "give one of them"),
    "str": ("text", "put it in quotes"),
    "list": ("a list", "give one, such as '[1, 2]'"),
    "dict": ("a mapping", "give one, such as '{a.txt: 0.7, b.txt: 0.3}'"),
    "tuple": ("a list", "give one, such as '[0.9, 0.95]'"),
}


def explain(
    message: str, parser: argparse.ArgumentParser, allowed_imports: Sequence[str] = ()
) -> str:
    """One line for the message of an ``ArgumentError``.

    Args:
        allowed_imports: The packages from which a configuration may name classes.
    """
    if match := _NOT_ALLOWED.search(message):
        return (
            f"{match['path']}: is not imported from a configuration, which may come from anywhere; "
            f"use a class of {', '.join(allowed_imports)}, or add its package with --allow_import"
        )
    if match := _AT_KEY.match(message):
        return _value_error(match["key"], match["cause"], parser)
    for pattern in _UNKNOWN:
        if match := pattern.search(message):
            key = match["key"].lstrip("-")
            group = match.groupdict().get("group")
            return _unknown_setting(
                f"{group}.{key.removeprefix(f'{group}.')}" if group else key, parser
            )
    if match := _REQUIRED.search(message):
        return _missing_settings(match["names"].split(", "), parser)
    for plain, line in _MESSAGES.items():
        if match := re.search(plain, message):
            return line.format(**match.groupdict())
    return f"{shorten(message, 200)}; {_see_help(parser)}"


def explain_class(message: str) -> str | None:
    """One line for a class that could not be created from its settings; None for any other message."""
    match = _IN_CLASS.search(message)
    return match and _class_error("", match["name"], match["cause"])


def _unknown_setting(key: str, parser: argparse.ArgumentParser) -> str:
    settings = {
        action.dest
        for action in parser._actions
        if _last_part(action.dest) not in ("help", "help_all", "config")
        and "print_" not in action.dest
        if not key.startswith(f"{action.dest}.")
    }
    near = nearest_setting(key, settings)
    return f"{key}: is not a setting; " + (f"did you mean {near}?" if near else _see_help(parser))


def _see_help(parser: argparse.ArgumentParser) -> str:
    complete = any(action.dest == "help_all" for action in parser._actions)
    return f"see {parser.prog} {'--help-all' if complete else '--help'}"


def _missing_settings(names: list[str], parser: argparse.ArgumentParser) -> str:
    actions = {action.dest: action for action in parser._actions}
    usage = []
    for name in names:
        action = actions.get(name)
        if action is None or action.option_strings:
            usage.append(f"--{name} {name.upper()}")
        else:
            usage.append(str(action.metavar or name.upper()))
    verb = "is" if len(names) == 1 else "are"
    return f"{', '.join(names)}: {verb} missing; give {' '.join(usage)}"


def _value_error(key: str, cause: str, parser: argparse.ArgumentParser) -> str:
    action = next((action for action in parser._actions if action.dest == key), None)
    if match := _IN_CLASS.search(cause):
        return _class_error(key, match["name"], match["cause"], getattr(action, "_typehint", None))
    value = _given_value(cause)
    bases = _base_classes(getattr(action, "_typehint", None))
    if "Unable to load config" in cause:
        return f"{key}: is neither settings nor a file of them; give for example --{key}.NAME VALUE"
    if bases and (match := _NO_IMPORT_PATH.search(cause)):
        return _not_a_class(key, match["name"].strip(), bases)
    if bases and "Not a valid subclass" in cause:
        return f"{key}: {value} is not a {bases[0].__name__}; give its class_path and init_args"
    return _wrong_type(key, value, cause, getattr(action, "default", None))


def _given_value(cause: str) -> str:
    """The value that the user gave; of a list or mapping, the element that is wrong."""
    values = {match["which"]: match["value"] for match in reversed([*_GIVEN.finditer(cause)])}
    complete = values.get("Given value", "")
    value = complete if complete and complete[0] not in "[{" else values.get("Got value", complete)
    return {"": "it", "None": "null"}.get(value) or shorten(value, 60)


def _wrong_type(key: str, value: str, cause: str, default: Any = None) -> str:
    """One line that says which types or choices a value must have, from those that jsonargparse has tried."""
    types: list[str] = []
    choices: list[str] = []
    for match in _EXPECTED.finditer(cause):
        if match["choices"] is not None:
            choices += [str(choice) for choice in ast.literal_eval(f"[{match['choices']}]")]
        elif match["length"] is not None:
            return f"{key}: {value} is not a list of {match['length']}; give as many values"
        else:
            types.append(_last_part(match["type"]))
    null = "NoneType" in types
    if choices:
        choices += ["true", "false"] if "bool" in types else []
        return f"{key}: {value} is unknown; {_name_choices(value, list(dict.fromkeys(choices)))}"
    kinds = [name for name in dict.fromkeys(types) if name in _TYPES]
    if "float" in kinds and "int" in kinds:
        kinds.remove("int")
    if not kinds:
        return f"{key}: {shorten(cause, 150)}; see the command's help"
    remedy = _TYPES[kinds[0]][1]
    if kinds[0] == "int" and (number := _as_whole_number(value)) is not None:
        remedy = f"write {number}"
    elif kinds[0] in ("int", "float") and isinstance(default, int | float):
        remedy = f"give one, such as {default}"
    elif null:
        remedy += ", or null"
    what = " or ".join(_TYPES[kind][0] for kind in kinds)
    if value.lower().strip("+-.") in ("nan", "inf", "infinity"):
        what = what.replace("a number", "a finite number")
    return f"{key}: {value} is not {what}; {remedy}"


def _name_choices(value: str, choices: list[str]) -> str:
    listed = ", ".join(choices)
    if near := nearest(value, choices):
        return f"did you mean {near}?" + (f" The choices are {listed}" if len(listed) < 120 else "")
    return f"give one of {listed}"


def _as_whole_number(value: str) -> int | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _class_error(key: str, class_path: str, cause: str, typehint: Any = None) -> str:
    """One line for a class in a configuration: an unknown or missing setting, a missing package, a wrong path."""
    name = _last_part(class_path)
    prefix = f"{key}." if key else ""
    if match := _AT_KEY.match(cause):
        if inner := _IN_CLASS.search(match["cause"]):
            return _class_error(f"{prefix}{match['key']}", inner["name"], inner["cause"])
        return _wrong_type(f"{prefix}{match['key']}", _given_value(match["cause"]), match["cause"])
    for pattern in _UNKNOWN:
        if match := pattern.search(cause):
            near = nearest_setting(match["key"], _parameters_of(class_path))
            remedy = f"did you mean {near}?" if near else f"see the documentation of {class_path}"
            return f"{prefix}{match['key']}: {name} has no such setting; {remedy}"
    if match := _REQUIRED.search(cause):
        first = match["names"].split(", ")[0]
        return f"{key or name}: {name} needs {match['names']}; give {prefix}{first}"
    if match := _REQUIREMENT.search(cause):
        what = f"{key}: {name}" if key else f"{name}:"
        return f"{what} needs {match['name']}; pip install '{match['name']}'"
    if _NO_ATTRIBUTE.search(cause) or "No module named" in cause or _NO_IMPORT_PATH.search(cause):
        return _not_a_class(key, class_path, _base_classes(typehint))
    if "'NoneType' object" in cause:
        return f"{key or name}: {name} has init_args that are null; give values, or leave init_args out"
    return f"{key or name}: {name}: {shorten(cause, 150)}; check its class_path and init_args"


def _not_a_class(key: str, name: str, bases: list[type]) -> str:
    """One line for a name that is not one of the classes that the setting accepts."""
    paths = {_last_part(path): path for base in bases for path in _public_subclasses(base)}
    kinds = " or ".join(base.__name__ for base in bases) or "class"
    remedy = "check its path"
    if near := nearest(_last_part(name), paths):
        remedy = f"did you mean {near}?"
    elif paths:
        remedy = f"give a class, such as {min(paths.values(), key=len)}"
    return f"{key}: {name} is not a {kinds}; {remedy}"


def _base_classes(typehint: Any) -> list[type]:
    """The base classes of what a setting accepts by a class path."""
    if inspect.isclass(typehint) and typehint.__module__.split(".")[0] in (
        "lightning", "lightning_fabric", "torch", "gpt_lightning",
    ):  # fmt: skip
        return [typehint]
    bases = [base for part in get_args(typehint) for base in _base_classes(part)]
    return list(dict.fromkeys(bases))


def _public_subclasses(base: type) -> set[str]:
    """Import paths of the public subclasses of a class, also of indirect ones."""
    paths: set[str] = set()
    subclass: type
    for subclass in base.__subclasses__():
        package = ".".join(subclass.__module__.split(".")[:3])
        is_public = hasattr(sys.modules.get(package), subclass.__name__)
        if is_public and not subclass.__name__.startswith("_"):
            paths.add(f"{package}.{subclass.__name__}")
        paths |= _public_subclasses(subclass)
    return paths


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _parameters_of(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
