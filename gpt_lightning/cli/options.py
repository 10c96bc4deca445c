"""Options of the commands that are not settings of a run, and help texts of other packages' settings.

Nothing here imports Lightning: the short help needs these texts at once.
"""

from jsonargparse import ArgumentParser

from gpt_lightning.cli.text_options import TextList
from gpt_lightning.model.hardware import MEMORY

CONFIG_HELP = "YAML file with options (repeatable); a later file wins over an earlier one."

# setting → help text; those of Lightning and jsonargparse are long, or not true here
HELP = {
    "help": "Show the settings that are changed most often, and exit.",
    "config": "YAML file, or a name (repeatable); 'configs list' shows the names; a later one wins.",
    "print_config": "Print all settings with their values; nothing runs. =skip_default leaves defaults out.",
    "trainer.accelerator": "Kind of device: auto, cpu or gpu; auto = a GPU if the machine has one.",
    "trainer.devices": "Number of devices, a list of them, or auto; auto = all GPUs, or one process on a CPU.",
    "trainer.precision": "Number format: 32-true, bf16-mixed, 16-mixed; mixed = autocast; null = 32-true.",
    "trainer.max_epochs": "Epochs after which the run ends; -1 = no limit; null = 1000, unless max_steps, "
    "max_tokens or max_time ends the run.",
    "trainer.max_steps": "Optimizer steps after which the run ends; -1 = no limit.",
    "trainer.log_every_n_steps": "Optimizer steps between two rows of train/loss, lr, gradient norm and speed; 0 = none; "
    "null = 10.",
    "trainer.default_root_dir": "Folder that contains checkpoints/; null = the working directory.",
}

# what validate reads from the settings that start a run
VALIDATE_HELP = {
    "run": "Name of the run that --ckpt_path last or best means.",
    "ckpt_path": "Weights of the run: last, best or a path.",
    "init_from": "Weights: a run, a file or gpt2-124M; also a folder of Hugging Face or OpenAI.",
}

GROUP_FILE_HELP = "YAML file with the settings of this group."
GROUP_TITLES = {
    "trainer": "Arguments of Lightning's Trainer",
    "model": "Optimizer, learning rate, and how a step is computed",
    "model.config": "Architecture",
    "data": "Text, windows and batches",
}


def add_options(parser: ArgumentParser, verb: str) -> None:
    """Add the options that only the command line has, or only the command ``verb``."""
    add = parser.add_argument
    add("--help-all", action="help", help="Show all settings, and exit.")
    add(
        "--allow_import",
        action=TextList,
        metavar="PACKAGE",
        help="A package whose classes a YAML file may name, besides gpt_lightning, lightning and torch; "
        "repeatable.",
    )
    if verb == "plan":
        _add_plan_options(parser)
    if verb == "report speed":
        add("--minutes", type=float, default=3.0, help="Time for all rows together.")
        add(
            "--out",
            type=str | None,
            metavar="FOLDER",
            help="Also write a figure, CSV and JSON there.",
        )
    if verb in ("validate", "plan", "report speed"):
        add("--json", action="store_true", help="Print one JSON object and nothing else.")


def _add_plan_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--devices",
        type=int | None,
        help="Devices on all machines; null = trainer.devices × num_nodes.",
    )
    add(
        "--gpu",
        type=str | None,
        help=f"GPU of the run: H100, A100, RTX 4090, ...; its peak and memory are used. Known are {', '.join(MEMORY)}. "
        "null = this machine's device.",
    )
    add("--device_memory_gb", type=float | None, help="Memory of one device in GB (10⁹ bytes).")
    add("--peak_tflops", type=float | None, help="Peak TFLOP/s of one device.")
    add("--mfu", type=float, default=0.4, help="Share of the peak FLOP/s that is used.")
    add(
        "--train_tokens",
        type=int | None,
        help="Tokens to train on; null = those of trainer.max_steps, max_epochs and max_tokens.",
    )


def help_texts(verb: str) -> dict[str, str]:
    """Setting → help text, where it is not the description in the docstring."""
    return HELP | VALIDATE_HELP if verb == "validate" else HELP


def improve_help(parser: ArgumentParser, verb: str) -> None:
    """Give the parser the help texts and titles of this module."""
    groups = parser.groups or {}
    texts = help_texts(verb) | dict.fromkeys(groups, GROUP_FILE_HELP)
    for action in parser._actions:
        action.help = texts.get(action.dest, action.help)
    for name, group in groups.items():
        group.title = GROUP_TITLES.get(name, group.title)
