"""What torchrun's restarts need beyond what Lightning does."""

import atexit
import os

import torch.distributed as dist
from lightning.pytorch import Trainer


def connect_ranks(trainer: Trainer) -> None:
    """Connect the ranks that torchrun has started, each restart's under a name of its own.

    The agent's store outlives a restart, and torch 2.13 keeps no restart's keys apart in it: gloo then may read
    the addresses of processes that are gone, and fails or waits for them. Elsewhere Lightning connects.
    """
    environment = os.environ
    if trainer.world_size == 1 or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
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
    atexit.register(_disconnect)


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
