"""GPT models with PyTorch Lightning: training, resuming, evaluation and text generation.

Public names are imported on first use, so ``from gpt_lightning import GPTModel`` does not load Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_lightning.data.datamodule import TextDataModule
    from gpt_lightning.generation.engine import generate, generate_simple
    from gpt_lightning.model.config import GPTConfig
    from gpt_lightning.model.gpt import GPTModel
    from gpt_lightning.pretrained.load import load_model
    from gpt_lightning.training.module import GPTLightningModule

__version__ = "0.1.0"

__all__ = [
    "GPTConfig",
    "GPTLightningModule",
    "GPTModel",
    "TextDataModule",
    "generate",
    "generate_simple",
    "load_model",
]

_MODULES = {
    "GPTConfig": "model.config",
    "GPTLightningModule": "training.module",
    "GPTModel": "model.gpt",
    "TextDataModule": "data.datamodule",
    "generate": "generation.engine",
    "generate_simple": "generation.engine",
    "load_model": "pretrained.load",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
