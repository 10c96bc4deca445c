"""What ``--ckpt_path`` (also ``auto``) and ``--init_from`` mean: a checkpoint to resume, existing or random weights."""

from dataclasses import dataclass
from pathlib import Path

from gpt_lightning.data.token_cache import find_tokenizer
from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.source import check_tokenizer, print_warnings, read_weights
from gpt_lightning.pretrained.weights import ModelWeights, with_head
from gpt_lightning.training.checkpoint_io import LAST, PREVIOUS
from gpt_lightning.training.config import RunConfig
from gpt_lightning.training.distributed import is_rank_zero
from gpt_lightning.training.module import reconcile_config
from gpt_lightning.training.optimizer import OptimizerConfig
from gpt_lightning.training.resume import checkpoint_to_resume


@dataclass(frozen=True, kw_only=True)
class Start:
    """Start of a run.

    Attributes:
        architecture: Architecture of the checkpoint or the weights, else the one that the settings name.
        checkpoint_path: Checkpoint that the run resumes; ``None`` for a new run.
        weights: Weights of a new run; ``None`` for random ones.
        tokenizer: Tokenizer of the model and the data.
    """

    architecture: GPTConfig
    tokenizer: Tokenizer
    checkpoint_path: Path | None = None
    weights: ModelWeights | None = None


def find_start(config: RunConfig, *, trains: bool = True) -> Start:
    """Find what ``ckpt_path`` and ``init_from`` name; keys of the architecture that the settings name must agree.

    Args:
        trains: Whether the run trains. Otherwise the weights of ``ckpt_path`` are read like those of ``init_from``.

    Raises:
        ValueError, OSError: There is no such checkpoint, or it has another architecture; one line.
    """
    named = config.given_architecture
    source = config.source
    if trains and config.ckpt_path == "auto":
        ckpt_path = "last" if was_started(config.folder) else None
        source = config.init_from
    else:
        ckpt_path = config.ckpt_path if trains else None
    if ckpt_path is not None:
        settings = ("optimizer", "decay_matrices_only")
        optimizer = OptimizerConfig(
            **{name: config.model[name] for name in settings if name in config.model}
        )
        path, architecture, of_run = checkpoint_to_resume(
            config.folder, ckpt_path, named, optimizer
        )
        tokenizer = _tokenizer(config, of_run)
        return Start(architecture=architecture, tokenizer=tokenizer, checkpoint_path=path)
    if source is None:
        tokenizer = _tokenizer(config, None)
        architecture = GPTConfig(**{"vocab_size": tokenizer.vocab_size, **named})
        return Start(architecture=architecture, tokenizer=tokenizer)
    weights = read_weights(source, n_heads=named.get("n_heads"))
    check_tokenizer(weights, source)
    if "tied_embeddings" in named:
        weights = with_head(weights, tied=named["tied_embeddings"])
    architecture = reconcile_config(f"init_from: {source}", weights.config, named, weights.assumed)
    if is_rank_zero():
        print_warnings(weights)
    tokenizer = _tokenizer(config, weights.tokenizer)
    return Start(architecture=architecture, tokenizer=tokenizer, weights=weights)


def _tokenizer(config: RunConfig, of_model: Tokenizer | None) -> Tokenizer:
    return find_tokenizer(config.data.get("tokenizer"), config.texts, of_model)


def was_started(folder: Path) -> bool:
    """Return whether a run has saved a checkpoint that it can resume from."""
    return any((folder / name).is_file() for name in (LAST, PREVIOUS))
