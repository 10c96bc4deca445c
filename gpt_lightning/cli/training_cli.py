"""LightningCLI for our module, data and callbacks: settings are parsed and checked, nothing runs."""

import json
import os
import warnings
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from gpt_lightning.cli.errors import explain_class
from gpt_lightning.cli.options import add_options, improve_help
from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.text_options import configs_first
from gpt_lightning.cli.yaml_input import load_checked
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.training.config import RunConfig
from gpt_lightning.training.lightning_messages import quiet_lightning
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.trainer_settings import check_trainer


class TrainingCLI(LightningCLI):
    """Settings of a run, parsed and checked; :meth:`run_config` returns them for the functions that run them."""

    @quiet_lightning()
    def __init__(self, verb: str, arguments: list[str], description: str | None) -> None:
        self.verb = verb
        self.arguments = arguments
        super().__init__(
            GPTLightningModule,
            TextDataModule,
            args=arguments,
            run=False,
            auto_configure_optimizers=False,
            save_config_callback=None,
            load_from_checkpoint_support=False,  # the module saves its hyperparameters itself
            parser_kwargs={
                "prog": f"gpt_lightning {verb}",
                "description": description,
                "exit_on_error": False,
            },
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunConfig, skip={"model", "data", "trainer"})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_options(parser, self.verb)
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target)
        for target in ("model.rng", "data.rng"):
            parser.link_arguments("rng", target)
        improve_help(parser, self.verb)

    def parse_arguments(self, parser: ArgumentParser, args: Any) -> None:
        self.arguments = configs_first(parser, args)
        self.config = parse(parser, self.arguments)
        if self.verb == "validate" and not self.config.config:
            self.arguments = [*self._data_of_run(), *self.arguments]
            self.config = parse(parser, self.arguments)
        check_trainer(self.config.trainer, trains=self.verb == "fit")
        self._settings()  # checks the name of the run and the seed

    def _data_of_run(self) -> list[str]:
        """Return the data settings of the run that the weights are from, as arguments; empty if they are not from a run."""
        named = self._settings().source
        source = Path(os.path.expanduser(named or ""))
        path = (source if source.is_dir() else source.parent) / "config.yaml"
        if not named or not path.is_file():
            return []
        recorded = load_checked(path.read_text(encoding="utf-8"), str(path))
        data = recorded.get("data") if isinstance(recorded, dict) else None
        if not isinstance(data, dict):
            raise ValueError(f"config: {path} has no data settings; give --config")
        if unknown := data.keys() - self.config.data.as_dict().keys():
            raise ValueError(
                f"config: {path} is from another version: data.{min(unknown)} is not a setting; "
                "give the text and its windows with --config"
            )
        given = {name for name in ("text", "mixture") if _is_given(f"data.{name}", self.arguments)}
        if given:  # the run's text is replaced
            data = {key: value for key, value in data.items() if key not in ("text", "mixture")}
        return [
            f"--data.{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in data.items()
            if value is not None and key not in ("seed", "rng")
        ]

    def instantiate_classes(self) -> None:
        """Create the objects that ``trainer.*`` names by class_path; the functions that run the settings do the rest."""
        try:
            self.config_init = self.parser.instantiate_classes(
                Namespace(trainer=self.config.trainer)
            )
        except ValueError as error:
            if line := explain_class(str(error)):
                raise ValueError(line) from error
            raise

    def run_config(self) -> RunConfig:
        """Return the settings, with the objects that ``trainer.*`` names by class_path."""
        config = self._settings()
        config.trainer = dict(vars(self.config_init.trainer))
        return config

    def recorded_trainer(self) -> dict[str, Any]:
        """Return the settings ``trainer.*`` as numbers, text, lists and mappings, as a YAML file has them."""
        trainer: dict[str, Any] = self._as_yaml(self.config)["trainer"]
        return trainer

    def given_settings(self) -> dict[str, Any]:
        """Return the settings that the user gives, in all files and on the command line, as one YAML file has them."""
        given = self._as_yaml(self._given())
        return {
            name: value for name, value in given.items() if name not in ("config", "allow_import")
        }

    def _as_yaml(self, settings: Namespace) -> dict[str, Any]:
        # the default of Lightning's Timer is an Enum where a string is expected
        yaml.SafeDumper.add_multi_representer(
            Enum, lambda dumper, enum: dumper.represent_data(enum.value)
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"\s*Unable to serialize instance")
            text = self.parser.dump(settings, skip_validation=True)
        plain: dict[str, Any] = _without_objects(yaml.safe_load(text))
        return plain

    def _settings(self) -> RunConfig:
        settings = self.config.as_dict()
        values = {field.name: settings[field.name] for field in fields(RunConfig)}
        for field in fields(RunConfig):
            if is_dataclass(field.type) and isinstance(field.type, type):
                values[field.name] = field.type(**values[field.name])
        for name in ("seed", "rng"):  # linked to settings of the run
            del values["model"][name], values["data"][name]
        if self.config.ckpt_path or self.config.init_from:
            values["model"]["config"] = self._named_architecture()
        return RunConfig(**values)

    def _named_architecture(self) -> dict[str, Any]:
        """Return the keys of ``model.config`` that the user gives; the others come from the weights."""
        return self._given().as_dict().get("model", {}).get("config") or {}

    def _given(self) -> Namespace:
        """Return the settings that the user gives, and those that others are linked to."""
        linked = [f"--rng={self.config.rng}", f"--seed_everything={self.config.seed_everything}"]
        return self.parser.parse_args(linked + self.arguments, defaults=False)


def _without_objects(value: Any) -> Any:
    """Leave out arguments of classes that jsonargparse cannot write, such as a default that is a torch.device."""
    if isinstance(value, dict):
        return {
            key: _without_objects(inner)
            for key, inner in value.items()
            if not str(inner).startswith("Unable to serialize instance")
        }
    return [_without_objects(inner) for inner in value] if isinstance(value, list) else value


def _is_given(option: str, arguments: list[str]) -> bool:
    """Return whether the command line names an option."""
    return any(argument.partition("=")[0] == f"--{option}" for argument in arguments)
