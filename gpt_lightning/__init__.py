"""GPT models with PyTorch Lightning: training, resuming, evaluation and text generation.

Public names are imported on first use, so ``from gpt_lightning import GPTModel`` does not load Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_lightning.data.datamodule import TextDataModule
    from gpt_lightning.data.tokenizer import decode, encode_prompt
    from gpt_lightning.generation.engine import generate, generate_simple
    from gpt_lightning.generation.sampling import SamplingParams
    from gpt_lightning.model.config import GPTConfig
    from gpt_lightning.model.gpt import GPTModel
    from gpt_lightning.pretrained.convert import save_model
    from gpt_lightning.pretrained.hub import push_to_hub
    from gpt_lightning.pretrained.load import load_model
    from gpt_lightning.training.build import build_trainer
    from gpt_lightning.training.config import (
        CheckpointConfig,
        EvaluationConfig,
        RunConfig,
        ThroughputConfig,
    )
    from gpt_lightning.training.module import GPTLightningModule
    from gpt_lightning.training.run import FitResult, fit, validate

__version__ = "0.1.0"

__all__ = [
    "CheckpointConfig",
    "EvaluationConfig",
    "FitResult",
    "GPTConfig",
    "GPTLightningModule",
    "GPTModel",
    "RunConfig",
    "SamplingParams",
    "TextDataModule",
    "ThroughputConfig",
    "build_trainer",
    "decode",
    "encode_prompt",
    "fit",
    "generate",
    "generate_simple",
    "load_model",
    "push_to_hub",
    "save_model",
    "validate",
]

_MODULES = {
    "CheckpointConfig": "training.config",
    "EvaluationConfig": "training.config",
    "FitResult": "training.run",
    "GPTConfig": "model.config",
    "GPTLightningModule": "training.module",
    "GPTModel": "model.gpt",
    "RunConfig": "training.config",
    "SamplingParams": "generation.sampling",
    "TextDataModule": "data.datamodule",
    "ThroughputConfig": "training.config",
    "build_trainer": "training.build",
    "decode": "data.tokenizer",
    "encode_prompt": "data.tokenizer",
    "fit": "training.run",
    "generate": "generation.engine",
    "generate_simple": "generation.engine",
    "load_model": "pretrained.load",
    "push_to_hub": "pretrained.hub",
    "save_model": "pretrained.convert",
    "validate": "training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet: notebooks complete them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
