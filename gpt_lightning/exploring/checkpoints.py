"""Models on disk that the page can show: the SOURCEs, the other checkpoints of their runs, and which of them changed."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from gpt_lightning.pretrained.source import weight_files
from gpt_lightning.pretrained.weights import read_torch

# the files of a run, as training writes them, in the order in which the page lists them
_NAMES = ("last", "best", "previous")
_KEPT = re.compile(r"step-\d+")

Stamp = tuple[tuple[int, int, int], ...]


@dataclass
class Checkpoint:
    """A model on disk.

    Attributes:
        id: Its name for clients; never a path.
        source: Id of the SOURCE that it belongs to.
        name: ``last``, ``best``, … of a run; ``None``: the SOURCE is not the folder of a run.
        location: What is loaded.
        files: The files of its weights.
        revision: Grows when one of ``files`` has changed.
        step: Optimizer steps of the weights; ``None`` if the file does not say it.
    """

    id: str
    source: str
    name: str | None
    location: str
    files: tuple[Path, ...]
    revision: int = 0
    step: int | None = None
    _stamp: Stamp | None = field(default=None, repr=False)

    def refresh(self) -> bool:
        """Look whether the files have changed. Return whether they exist; if they do not, nothing changes."""
        stamp = _stamp(self.files)
        if stamp is not None and stamp != self._stamp:
            self._stamp = stamp
            self.revision += 1
            self.step = _step(self.files)
        return stamp is not None


@final
class Checkpoints:
    """The SOURCEs and the other checkpoints of their runs.

    Args:
        sources: SOURCE of each id.

    Raises:
        OSError: A SOURCE does not exist.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources: list[Checkpoint] = []
        self._runs: dict[str, Path] = {}  # folder of each SOURCE that is a run
        for source_id, source in sources.items():
            files = weight_files(source)
            folder = Path(os.path.expanduser(source)).resolve()
            name, location = None, source
            if files[0].suffix == ".ckpt" and files[0].parent == folder:
                self._runs[source_id] = folder
                # last.ckpt may appear later beside best.ckpt: the SOURCE stays what it was
                name, location = files[0].stem, str(files[0])
            self.sources.append(Checkpoint(source_id, source_id, name, location, tuple(files)))
        self._others: dict[str, Checkpoint] = {}

    def refresh(self, kept: frozenset[str] = frozenset()) -> list[Checkpoint]:
        """All checkpoints that there are now, the SOURCEs first. Files that have not changed are not opened.

        Args:
            kept: Ids of checkpoints that stay in the list although their file is gone.
        """
        for source in self.sources:
            source.refresh()
        for source_id, folder in self._runs.items():
            for name in _run_checkpoints(folder):
                path = folder / f"{name}.ckpt"
                other = Checkpoint(f"{source_id}/{name}", source_id, name, str(path), (path,))
                if all(path not in source.files for source in self.sources):
                    self._others.setdefault(other.id, other)
        self._others = {
            other.id: other
            for other in self._others.values()
            if other.refresh() or other.id in kept
        }
        return [*self.sources, *self._others.values()]


def _run_checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints in a run's folder, without ``.ckpt``."""
    try:
        names = {
            name.removesuffix(".ckpt") for name in os.listdir(folder) if name.endswith(".ckpt")
        }
    except OSError:  # the folder is gone
        return []
    kept = sorted(filter(_KEPT.fullmatch, names), key=lambda name: (len(name), name))
    return [*(name for name in _NAMES if name in names), *kept]


def _stamp(files: tuple[Path, ...]) -> Stamp | None:
    """What changes when a file is written or replaced; ``None`` if a file does not exist."""
    try:
        status = [file.stat() for file in files]
    except OSError:
        return None
    return tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in status)


def _step(files: tuple[Path, ...]) -> int | None:
    """The step that a checkpoint of ours holds. Its tensors are not read."""
    if len(files) != 1 or files[0].suffix != ".ckpt":
        return None
    try:
        content = read_torch(files[0])
    except (ValueError, OSError):  # loading it says what is wrong
        return None
    step = content.get("global_step") if isinstance(content, dict) else None
    return step if type(step) is int else None
