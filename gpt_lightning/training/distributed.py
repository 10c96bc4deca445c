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
from torch import Tensor
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
    if isinstance(launcher, SubprocessLauncher) and trainer.num_nodes == 1:
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
    """FSDP2 over all devices, whose checkpoints are one file, with what one process writes.

    So any of them can be gone on with, or read, on any number of devices. Rank 0 holds a whole copy in main memory
    while it saves: weights and both moments, 12 bytes a parameter in float32. Lightning's own strategy does
    not hold a file against its sums, and takes an optimizer's groups for one.

    Args:
        process_group_backend: How they talk; none: what suits them, nccl on GPUs and gloo on CPUs.
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
        """Gradients are summed up whole on each device, and shared out with the accumulation's last."""
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
        return self._whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return self._whole(optimizer.state_dict())

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """All ranks take part in putting it together, tensor by tensor; rank 0 alone keeps it."""

        def put_together(shard: DTensor) -> Tensor | None:
            whole = shard.full_tensor().detach()
            return whole.cpu() if self.is_global_zero else None

        gathered: dict[str, Any] = tree_map_only(DTensor, put_together, state)
        return gathered if self.is_global_zero else {}

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
    """``ValueError`` for one whose checkpoints another number of devices could not read, or that cannot be resumed."""
    forks = forks_processes(strategy)
    if forks or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy):
        name = f"{type(strategy).__name__}{' in forked processes' if forks else ''}"
        raise ValueError(
            f"trainer.strategy: {name} writes no checkpoints that any number of devices can go on with; give ddp, or "
            "for shards --config configs/fsdp.yaml"
        )


def shard_model(model: GPTModel, mesh: DeviceMesh, precision: str) -> None:
    """Each block a unit that is gathered and let go of as a whole; embedding, last norm and head the root's.

    The weights must be the same on all ranks, and each keeps its rows. With precision 'bf16-mixed' they
    are gathered in bfloat16; gradients are reduced in float32 with any.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        reduce_dtype=None if precision == "32-true" else torch.float32,
        cast_forward_inputs=False,  # autocast does; FSDP2 would copy a KV cache
    )
    for block in model.trf_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # what is called without forward around it; the root's weights stay until the backward pass, for the head
    for method in ("features", "head"):
        register_fsdp_forward_method(model, method)


def sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """``value``, which all ranks have whole, as ``parameter`` of its shape lies on the devices."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return value


def load_optimizer_state(optimizer: Optimizer, stored: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict`` of a whole state, whatever its parameters are sharded over."""
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = dict(stored["state"])
    for number, parameter in zip(numbers, parameters, strict=False):
        if number in state:
            state[number] = {
                key: sharded_like(parameter, value) if isinstance(value, Tensor) else value
                for key, value in state[number].items()
            }
    optimizer.load_state_dict({**stored, "state": state})


def local(tensor: Tensor) -> Tensor:
    """What of it lies on this device."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
