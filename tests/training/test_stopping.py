"""The graceful stop of several ranks."""

import ctypes
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt_lightning.training import stopping
from gpt_lightning.training.stopping import GracefulStop
from gpt_lightning.training.windows_console import ConsoleCloseHandler


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


def test_closed_console_stops_the_run_and_the_handler_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The functions of Windows are replaced; the real ones were not available."""
    registered: list[tuple[Any, bool]] = []
    kernel32 = SimpleNamespace(SetConsoleCtrlHandler=lambda *call: registered.append(call))
    monkeypatch.setattr(ctypes, "WinDLL", lambda name: kernel32, raising=False)
    monkeypatch.setattr(ctypes, "WINFUNCTYPE", ctypes.CFUNCTYPE, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGTERM, raising=False)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)

    stop = GracefulStop()
    stop._console.install()
    [(handler, is_added)] = registered
    assert is_added
    for event in (0, 1):  # Ctrl-C and Ctrl-Break are signals
        assert not handler(event)
    assert (stop._pending, waited) == (0, [])
    assert handler(2)
    assert stop._pending == signal.SIGTERM
    assert waited == [60.0]
    stop._console.remove()
    assert registered == [(handler, True), (handler, False)]


def test_console_handler_does_nothing_elsewhere() -> None:
    handler = ConsoleCloseHandler(lambda: None)
    handler.install()
    handler.remove()
    assert handler._handler is None
