"""SOURCE, wherever a command takes one, to weights."""

from pathlib import Path

import torch

from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.pretrained.formats import Source, read_lightning


def find_checkpoint(source: str) -> Path:
    """A checkpoint file: itself, ``last`` or ``best`` of a run's folder, or of a folder its ``last``.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(source).expanduser().resolve()
    candidates = [path, path.with_name(path.name + ".ckpt"), path / "last.ckpt", path / "best.ckpt"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise FileNotFoundError(
            f"{source}: holds neither last.ckpt nor best.ckpt; give a run's folder or a file"
        )
    raise FileNotFoundError(f"{source}: does not exist; give a checkpoint file or a run's folder")


def read_source(source: str) -> Source:
    """Weights and architecture of what ``source`` names.

    Raises:
        ValueError: The file is none of the forms, or damaged.
        OSError: There is no such file, or it cannot be read.
    """
    found = read_lightning(find_checkpoint(source))
    _build(found, source)  # on the meta device: names and shapes are checked, nothing is copied
    return found


def load_model(
    source: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GPTModel:
    """The model that ``source`` names, in eval mode; for errors see :func:`read_source`.

    The weights are taken over from the memory-mapped file, never held twice.
    """
    model = _build(read_lightning(find_checkpoint(source)), source)
    return model.to(device=device, dtype=dtype).eval()


def _build(found: Source, source: str) -> GPTModel:
    with torch.device("meta"):
        model = GPTModel(found.config)
    try:
        model.load_state_dict(found.state_dict, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{source}: has weights that contradict its own architecture; give another"
        ) from error
    return model
