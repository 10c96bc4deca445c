"""Processes of a run on several devices: how they find each other, and how they end together."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher


def init_elastic_process_group(trainer: Trainer) -> None:
    """Connect the ranks that torchrun has started, each restart's under a name of its own.

    The agent's store outlives a restart, and torch 2.13 keeps no restart's keys apart in it: gloo then may read
    the addresses of processes that are gone, and fails or waits for them. Elsewhere Lightning connects.
    """
    environment = os.environ
    if trainer.world_size == 1:
        return
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _forget_address(trainer)
        return
    restart = environment["TORCHELASTIC_RESTART_COUNT"]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False
    )
    on_gpu = trainer.strategy.root_device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(f"restart-{restart}", store),  # type: ignore[attr-defined]
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
    )


def _forget_address(trainer: Trainer) -> None:
    """On one machine Lightning finds a free port itself; what is left over in the environment may be in use."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher) and trainer.num_nodes == 1:
        if launcher.cluster_environment.creates_processes_externally:
            return
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


@contextmanager
def terminate_ranks_on_error(trainer: Trainer) -> Iterator[None]:
    """Disconnect the ranks at the end; when this one fails, end those that it has launched, which would wait for it.

    Gloo's threads may need the interpreter, so they end before it does. A rank that fails does not wait for them:
    what they are at may need the others.

    Raises:
        ValueError: The processes cannot connect.
    """
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))
        if isinstance(error, dist.DistNetworkError):
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ValueError(
                f"MASTER_PORT: the processes cannot connect at {address} "
                f"({' '.join(str(error).split())[:120]}); give another port"
            ) from error
        raise
