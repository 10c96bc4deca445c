"""Options of ``fit``, ``validate`` and ``plan`` besides those of the trainer, the model and the data."""

from lightning.pytorch.cli import LightningArgumentParser

from gpt_lightning.cli.text_options import TextList
from gpt_lightning.data.dataloader import Rng
from gpt_lightning.training.checkpoint_callback import checkpointing
from gpt_lightning.training.evaluation import evaluation_callbacks
from gpt_lightning.training.skip_step import OnBadStep


def add_settings(parser: LightningArgumentParser, verb: str) -> None:
    """Add the options of the command ``verb`` to its parser."""
    parser.add_argument(
        "--run", type=str, default="run", help="Name of the run: its files are in checkpoints/NAME."
    )
    parser.add_argument(
        "--rng",
        type=Rng,
        default="step",
        help="Source of random numbers: step = computed from seed and step; "
        "global = torch's global generator, as in the book.",
    )
    parser.add_argument(
        "--ckpt_path",
        type=str | None,
        help="Checkpoint from which the run resumes: last, best or a path; auto = last if it exists, else a new run.",
    )
    parser.add_argument(
        "--init_from",
        type=str | None,
        help="SOURCE of a new run's initial weights: a run, a checkpoint, GPT-2's files, or a name such as gpt2-124M.",
    )
    parser.add_argument(
        "--init_optimizer",
        type=bool,
        default=False,
        help="true = also load the optimizer's state from --init_from.",
    )
    parser.add_argument(
        "--allow_import",
        action=TextList,
        metavar="PACKAGE",
        help="A package whose classes a YAML file may name, besides gpt_lightning, lightning and torch; "
        "repeatable.",
    )
    parser.add_argument(
        "--keep_freed_memory",
        type=bool,
        default=True,
        help="true = on a CPU, the process keeps the memory that a step frees for the next step: steps take a quarter "
        "less time and up to 40 percent more memory.",
    )
    parser.add_argument(
        "--max_tokens",
        type=int | None,
        help="Training tokens after which the run ends, unless trainer.max_epochs or trainer.max_steps ends it "
        "earlier; null = no limit.",
    )
    parser.add_argument(
        "--bad_steps",
        type=OnBadStep,
        default="stop",
        help="Action after a loss or gradient that is not finite: stop = end the run before the optimizer step; "
        "skip = leave the optimizer step out.",
    )
    parser.add_argument(
        "--max_bad_steps",
        type=int,
        default=10,
        help="Number of skipped optimizer steps in a row after which the run stops.",
    )
    parser.add_argument(
        "--skip_spikes",
        type=bool,
        default=False,
        help="true = also skip an optimizer step whose loss or gradient norm is 6 standard deviations above those of "
        "the last 128 steps.",
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
        help="Optimizer steps between two log entries of tokens per second, MFU and memory.",
    )
    parser.add_function_arguments(checkpointing, "checkpoint", skip={"folder", "losses", "clock"})
    for target in ("model.seed", "data.seed"):
        parser.link_arguments("seed_everything", target)
    for target in ("model.rng", "data.rng"):
        parser.link_arguments("rng", target)
