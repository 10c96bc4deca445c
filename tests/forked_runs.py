"""Many short runs of the real command, each forked from one process that has imported Lightning already.

As a script it is that process: a line of JSON in for each run, a line out with how it ended. ``Runs`` starts it.
"""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from helpers import ENVIRONMENT

POINTS = (
    "batch",  # before a batch
    "evaluation",  # between the losses of the two splits
    "sample",  # before a sample is shown
    "save:written",  # a checkpoint is written beside its place
    "save:manifest",  # and recorded
    "save:rotated",  # and the one before it renamed
    "save:replaced",  # and in its place
    "save:named",  # and has a further name
    "saved",  # after the batch in which it was saved
    "epoch end",  # between the hooks at an epoch's end
)


class Stop(NamedTuple):
    """A signal that the process sends to itself.

    Attributes:
        point: One of ``POINTS``.
        step: Optimizer steps completed when it is sent, or the next at which ``point`` is reached.
    """

    signum: int
    point: str
    step: int


class Runs:
    """The process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=60)

    def run(self, folder: Path, arguments: list[str], stop: Stop | None = None) -> int:
        """Run ``gpt_lightning ARGUMENTS`` in ``folder``; return the exit code, or minus the signal that ended it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"folder": str(folder), "arguments": arguments, "stop": stop}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline()))


# --- the process ----------------------------------------------------------------------------------


def _serve() -> None:
    import torch
    from lightning.pytorch import Trainer  # noqa: F401

    from gpt_lightning.cli import fit  # noqa: F401
    from gpt_lightning.data.tokenizer import gpt2_encoding

    torch.set_num_threads(1)
    # made once instead of in each fork; forks share frozen objects, and do not collect them
    gpt2_encoding()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            _run(request)
        _, status = os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def _run(request: dict[str, Any]) -> None:
    """Run the command in a fork, which ends here."""
    from gpt_lightning.cli.main import main

    code = 99
    try:
        os.chdir(request["folder"])
        for descriptor, name in ((0, os.devnull), (1, "out"), (2, "err")):
            flags = os.O_RDONLY if descriptor == 0 else os.O_CREAT | os.O_APPEND | os.O_WRONLY
            os.dup2(os.open(name, flags, 0o644), descriptor)
        os.environ["GPT_LIGHTNING_CACHE"] = str(Path("cache").absolute())
        if request["stop"] is not None:
            _stop_at(Stop(*request["stop"]))
        code = main(request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _stop_at(stop: Stop) -> None:
    """Let the process send the signal to itself at the given point."""
    from lightning.pytorch.loops.fit_loop import _FitLoop

    from gpt_lightning.training import checkpoint_callback, checkpoint_io, evaluation
    from gpt_lightning.training.module import GPTLightningModule

    sent = False

    def reached(point: str, step: int) -> None:
        nonlocal sent
        if not sent and point == stop.point and step >= stop.step:
            sent = True
            os.kill(os.getpid(), stop.signum)

    def around(
        owner: Any, name: str, before: Callable[..., None] | None, after: Any = None
    ) -> None:
        real = getattr(owner, name)

        def patched(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args)
            result = real(*args, **kwargs)
            if after is not None:
                after(*args)
            return result

        setattr(owner, name, patched)

    saving_step = [0]

    def remember(content: Any, *_: Any) -> None:
        saving_step[0] = content.get("global_step", -1)  # the check before the first step has none

    def replaced(_: Any, target: Any) -> None:
        if Path(target).name == checkpoint_io.LAST:
            reached("save:replaced", saving_step[0])

    validation = "validation_windows"
    from gpt_lightning.data.datamodule import TextDataModule

    around(GPTLightningModule, "on_train_batch_start",
           lambda module, *_: reached("batch", module.trainer.global_step))  # fmt: skip
    around(TextDataModule, validation,
           lambda data: data.trainer.training and reached("evaluation", data.trainer.global_step))  # fmt: skip
    around(evaluation.SampleTextCallback, "_sample",
           lambda _, trainer, *__: reached("sample", trainer.global_step))  # fmt: skip
    around(
        checkpoint_io, "write_hashed", remember, lambda *_: reached("save:written", saving_step[0])
    )
    around(
        checkpoint_io, "_write_manifest", None, lambda *_: reached("save:manifest", saving_step[0])
    )
    around(
        checkpoint_io, "_rotate_previous", None, lambda *_: reached("save:rotated", saving_step[0])
    )
    around(checkpoint_io.os, "replace", None, replaced)
    around(checkpoint_io.AtomicCheckpointIO, "add_name", None,
           lambda *_: reached("save:named", saving_step[0]))  # fmt: skip
    around(checkpoint_callback.CheckpointCallback, "_save", None,
           lambda _, trainer, *__: reached("saved", trainer.global_step))  # fmt: skip
    around(_FitLoop, "on_advance_end", lambda loop: reached("epoch end", loop.trainer.global_step))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent's Ctrl-C
    _serve()
