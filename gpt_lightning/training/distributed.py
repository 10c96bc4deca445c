"""Several devices: how ranks connect and end together, and FSDP2."""

import os
import signal
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.training.lightning_compat import (
    SubprocessLauncher,
    forks_processes,
    set_data_parallel_size,
)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of the ranks' tensors. Lightning's ``strategy.reduce`` has a barrier, which a GPU's host waits for."""
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def is_rank_zero() -> bool:
    """Return whether this is rank 0; before Lightning starts its processes, from the launcher's environment."""
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]


def init_elastic_process_group(trainer: Trainer) -> None:
    """Connect the ranks that torchrun started, with a key prefix for each restart.

    The agent's store outlives a restart, and torch 2.13 does not separate the keys of two restarts: gloo may read
    the addresses of processes that have ended, and fails or waits for them. Without torchrun, Lightning connects.
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
    """Let Lightning find a free port on one machine; the one in the environment may be in use."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, SubprocessLauncher) and trainer.num_nodes == 1:
        if launcher.cluster_environment.creates_processes_externally:
            return
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


@contextmanager
def terminate_ranks_on_error(trainer: Trainer) -> Iterator[None]:
    """Disconnect the ranks at the end; if this rank fails, terminate the ranks it launched, which would wait for it.

    Gloo's threads may use the interpreter, so they have to end before it does. A failed rank does not wait for
    them, because they may be waiting for other ranks.

    Raises:
        ValueError: The processes cannot connect.
    """
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, SubprocessLauncher):
            launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))
        if isinstance(error, dist.DistNetworkError):
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ValueError(
                f"MASTER_PORT: the processes cannot connect at {address} "
                f"({' '.join(str(error).split())[:120]}); give another port"
            ) from error
        raise


class FSDP2Strategy(ModelParallelStrategy):
    """Strategy that shards weights, gradients and optimizer with FSDP2, and saves the same single file as one device.

    A checkpoint can be read and resumed on any number of devices. Rank 0 holds a full copy in main memory while
    it saves: weights and both moments, 12 bytes a parameter in float32. Lightning's own strategy does not verify
    checksums, and merges the optimizer's parameter groups.

    Args:
        process_group_backend: 'nccl' or 'gloo'; ``None``: nccl on GPUs, gloo on CPUs.
    """

    def __init__(self, process_group_backend: Literal["nccl", "gloo"] | None = None) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        # Lightning's 'auto' would split each node's matrices among its devices
        set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Accumulate full gradients on each device; the last micro-batch reduces and shards them."""
        model = self.lightning_module
        assert model is not None
        roots = [module for module in model.children() if isinstance(module, FSDPModule)]
        for root in roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in roots:
                root.set_requires_gradient_sync(True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.gather(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return self.gather(optimizer.state_dict())

    def gather(self, state: dict[str, Any]) -> dict[str, Any]:
        """Gather the full tensors, one at a time; all ranks take part, and rank 0 keeps them."""

        def gather(shard: DTensor) -> Tensor | None:
            full = shard.full_tensor().detach()
            return full.cpu() if self.is_global_zero else None

        gathered: dict[str, Any] = tree_map_only(DTensor, gather, state)
        return gathered if self.is_global_zero else {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        # Lightning's refuses storage_options, because it may write another format
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        own = module.state_dict()
        stored = {
            name: sharded_like(own[name], value) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        module.load_state_dict(stored, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer_state(optimizer, stored)


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy whose checkpoints cannot be resumed on another number of devices, with a ``ValueError``."""
    forks = forks_processes(strategy)
    if forks or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy):
        name = f"{type(strategy).__name__}{' in forked processes' if forks else ''}"
        raise ValueError(
            f"trainer.strategy: {name} does not write checkpoints that any number of devices can resume; give ddp, or "
            "--config configs/fsdp.yaml for shards"
        )


def shard_model(model: GPTModel, mesh: DeviceMesh, precision: str) -> None:
    """Shard a model in place: each block is one FSDP unit, the rest (embeddings, last norm, head) is the root's.

    The weights must be the same on all ranks; each rank keeps its rows. With 'bf16-mixed' weights are gathered
    in bfloat16. Gradients are always reduced in float32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        reduce_dtype=None if precision == "32-true" else torch.float32,
        cast_forward_inputs=False,  # autocast does; FSDP2 would copy a KV cache
    )
    for block in model.trf_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # These methods are called without forward; the root's weights stay gathered until the backward pass.
    for method in ("features", "head"):
        register_fsdp_forward_method(model, method)


def reshard(module: nn.Module) -> None:
    """Free the weights that FSDP2 has gathered, so that the next forward pass gathers them again."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, which every rank has in full, sharded like ``parameter``."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return value


def load_optimizer_state(optimizer: Optimizer, stored: Mapping[str, Any]) -> None:
    """Load a full optimizer state, sharded like the optimizer's parameters."""
    indices = [index for group in stored["param_groups"] for index in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = dict(stored["state"])
    for index, parameter in zip(indices, parameters, strict=False):
        if index in state:
            state[index] = {
                key: sharded_like(parameter, value) if isinstance(value, Tensor) else value
                for key, value in state[index].items()
            }
    optimizer.load_state_dict({**stored, "state": state})


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor on this device."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
