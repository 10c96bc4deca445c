"""Callbacks for runs of several test files."""

from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback

from runs import RUN


class RemovesFiles(Callback):
    """Callback that removes files of the run after its second step, as a user may do."""

    names: ClassVar[list[str]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            for name in self.names:
                (RUN / name).rename(f"taken-{name}")


class HoldsAPath(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"where": Path("x")}
