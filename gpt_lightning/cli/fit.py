"""Commands ``fit`` and ``validate``: settings become a run, its result an exit code or a table."""

import json
from typing import Any

from gpt_lightning.cli.training_cli import TrainingCLI
from gpt_lightning.training import run
from gpt_lightning.training.distributed import is_rank_zero
from gpt_lightning.training.stopping import EXIT_CODES


def fit(arguments: list[str]) -> int:
    """Train a model. The first of these that is given decides what the run starts from:

    1. --ckpt_path: the same run resumes, with its weights, optimizer, data position and random numbers. With
       'auto' it resumes if it was started before, and starts otherwise.
    2. --init_from: a new run with existing weights, and existing moments with --init_optimizer true.
    3. Neither: a new run with random weights.
    With 1 and 2 the architecture is that of the weights, and a configuration that names another one is refused. All
    other settings come from the configuration.
    """
    cli = TrainingCLI("fit", arguments, fit.__doc__)
    result = run.fit(cli.run_config(), recorded_trainer=cli.recorded_trainer())
    return 0 if result.stopped_by is None or not is_rank_zero() else EXIT_CODES[result.stopped_by]


def validate(arguments: list[str]) -> None:
    """Compute loss and perplexity of a model on both splits of a text; every token has the same weight.

    The weights are those of --ckpt_path (last, best or a path), else of --init_from SOURCE.
    """
    cli = TrainingCLI("validate", arguments, validate.__doc__)
    result = run.validate(cli.run_config(), val_only=cli.config.val_only)
    if not is_rank_zero():
        return
    if cli.config.json:
        print(json.dumps(result))
    else:
        _print_validation(result)


def _print_validation(result: dict[str, Any]) -> None:
    text = ", ".join(result["text"]) if isinstance(result["text"], list) else result["text"]
    print(f"weights     {result['source']}")
    print(
        f"text        {text}, windows of {result['context_length']} tokens, one every {result['stride']}"
    )
    for split, name in (("train", "training"), ("val", "validation")):
        if f"{split}_loss" not in result:
            continue
        print(
            f"{name:<10}  loss {result[f'{split}_loss']:.6f}  "
            f"perplexity {result[f'{split}_perplexity']:.3f}  "
            f"bits/byte {result[f'{split}_bits_per_byte']:.4f}  "
            f"tokens {result[f'{split}_tokens']:,}  windows {result[f'{split}_windows']:,}"
        )
