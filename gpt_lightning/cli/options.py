"""What ``fit``, ``validate`` and ``plan`` can be told besides Lightning's trainer, the model and the data."""

from lightning.pytorch.cli import LightningArgumentParser

from gpt_lightning.cli.text_options import TextList
from gpt_lightning.data.dataloader import Rng
from gpt_lightning.training.checkpoint_callback import checkpointing
from gpt_lightning.training.evaluation import evaluation_callbacks
from gpt_lightning.training.skip_step import OnBadStep


def add_settings(parser: LightningArgumentParser, verb: str) -> None:
    parser.add_argument(
        "--run", type=str, default="run", help="The run's name, a folder in checkpoints/."
    )
    parser.add_argument(
        "--rng",
        type=Rng,
        default="step",
        help="Where random numbers come from: 'step', functions of seed and step; "
        "'global', torch's global generator, as in the book.",
    )
    parser.add_argument(
        "--ckpt_path",
        type=str | None,
        help="Go on with the run: last, best or a checkpoint's path; auto: last where there is one.",
    )
    parser.add_argument(
        "--init_from",
        type=str | None,
        help="SOURCE of the weights to begin with: a run, a checkpoint, GPT-2's files or its name.",
    )
    parser.add_argument(
        "--init_optimizer",
        type=bool,
        default=False,
        help="Whether the optimizer's state comes from --init_from too.",
    )
    parser.add_argument(
        "--allow_import",
        action=TextList,
        metavar="PACKAGE",
        help="A package, besides ours, lightning and torch, that class paths in a YAML file may "
        "name; repeatable.",
    )
    parser.add_argument(
        "--keep_freed_memory",
        type=bool,
        default=True,
        help="On a CPU, whether memory that a step has freed stays with the process for the next: a fourth less "
        "time, up to 40 %% more memory.",
    )
    parser.add_argument(
        "--max_tokens",
        type=int | None,
        help="Training tokens after which the run ends, beside trainer.max_epochs and trainer.max_steps.",
    )
    parser.add_argument(
        "--bad_steps",
        type=OnBadStep,
        default="stop",
        help="What a loss or gradient that is not finite does: stop the run before the update, "
        "or skip the update.",
    )
    parser.add_argument(
        "--max_bad_steps",
        type=int,
        default=10,
        help="Skipped updates in a row after which the run stops.",
    )
    parser.add_argument(
        "--skip_spikes",
        type=bool,
        default=False,
        help="Whether updates 6 standard deviations off the 128 before are skipped too.",
    )
    if verb == "validate":
        parser.add_argument(
            "--json", action="store_true", help="Print one JSON object and nothing else."
        )
    parser.add_function_arguments(evaluation_callbacks, "evaluation", skip={"rng", "clock"})
    parser.add_argument(
        "--throughput.every_n_steps",
        type=int,
        default=50,
        help="Updates from one logging of tokens a second, MFU and memory to the next.",
    )
    parser.add_function_arguments(checkpointing, "checkpoint", skip={"folder", "losses", "clock"})
    for target in ("model.seed", "data.seed"):
        parser.link_arguments("seed_everything", target)
    for target in ("model.rng", "data.rng"):
        parser.link_arguments("rng", target)
