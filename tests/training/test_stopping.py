"""The graceful stop of several ranks."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt_lightning.training import stopping
from gpt_lightning.training.stopping import GracefulStop


@pytest.mark.parametrize(("later", "stops_after"), [(False, 2), (True, 3)])
def test_ranks_stop_after_the_same_step(
    monkeypatch: pytest.MonkeyPatch, later: bool, stops_after: int
) -> None:
    """The second of two ranks gets a signal in the second step; on GPUs the flags are read one step later."""
    ranks = [GracefulStop(), GracefulStop()]
    monkeypatch.setattr(stopping, "_reads_later", lambda device: later)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda t, op: t.fill_(max(r._pending for r in ranks))
    )
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    stopped = []
    for step in range(1, 6):
        if step == 2:
            ranks[1]._note(signal.SIGTERM, None)
        for rank, its in enumerate(ranks):
            loop = SimpleNamespace(min_epochs=1, epoch_loop=SimpleNamespace(min_steps=9))
            trainer: Any = SimpleNamespace(global_step=step, world_size=2, is_global_zero=rank == 0,
                                           fit_loop=loop, should_stop=False)  # fmt: skip
            its.on_train_batch_end(trainer, module, None, None, 0)
            if trainer.should_stop:
                stopped.append((rank, step))
    assert stopped == [(0, stops_after), (1, stops_after)]
    assert [its.received for its in ranks] == [signal.SIGTERM] * 2
