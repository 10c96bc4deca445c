"""What a training step holds in memory, counted on tensors that have shapes and no content.

The step is the real one: the model, its loss and torch's backward pass run on fake tensors, and every storage is
written down when it is made and when it is let go. FSDP2 shards over a group of processes that are not there.
So the figures follow the code, and cost no memory. What is counted are tensors: not what an allocator
rounds up, keeps back or loses to gaps, nor the workspaces that kernels take and return.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.loss import chunked_cross_entropy, cross_entropy
from gpt_lightning.model.precision import PRECISIONS
from gpt_lightning.planning.as_on_cuda import as_on_cuda
from gpt_lightning.planning.heap import Heap

DeviceType = Literal["cpu", "cuda"]

# trainer.precision → what weights are kept in, and what autocast computes in
UPDATES = 2  # after which a heap grows no more that matters


@dataclass(frozen=True)
class StepShape:
    """What decides a step's memory on one device.

    Attributes:
        batch_size: B, windows of one micro-batch.
        length: T, tokens of a window.
        precision: A key of :data:`PRECISIONS`.
        accumulate: Whether an update has several micro-batches, so that gradients are there from the start.
        device: Whose kernels and whose autocast.
        loss_kernel: Whether the GPU runs our kernel of a chunk's loss, as NVIDIA's do from Ampere on.
        shards: Devices over which FSDP2 spreads weights, gradients and moments; 1: each holds all.
    """

    config: GPTConfig
    batch_size: int
    length: int
    precision: str = "32-true"
    loss_chunk_size: int | None = None
    activation_checkpointing: bool = False
    accumulate: bool = False
    device: DeviceType = "cpu"
    loss_kernel: bool = True
    shards: int = 1


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes on one device at the moment of a step that holds most; they are there at the same time.

    Attributes:
        weights: Of the model, or this device's shard of them.
        gradients: As ``weights``; of the update before until its backward pass begins.
        moments: AdamW's two a weight.
        copies: Weights in the precision that autocast computes in.
        gathered: Whole weights and gradients on their way from and to other devices' shards.
        activations: What blocks, embeddings and the last norm keep for the backward pass.
        loss: Logits, their softmax and gradient; with chunks the gradients by features and head.
        backward: What the backward pass makes and uses up.
        kept: On a CPU what malloc keeps of freed memory, see :class:`Heap`.
        phase: When: in the forward pass, the loss or the backward pass.
    """

    weights: int
    gradients: int
    moments: int
    copies: int
    gathered: int
    activations: int
    loss: int
    backward: int
    kept: int
    phase: str

    @property
    def total(self) -> int:
        return (
            self.weights + self.gradients + self.moments + self.copies
            + self.gathered + self.activations + self.loss + self.backward + self.kept
        )  # fmt: skip


def held(step: StepShape) -> MemoryBreakdown:
    """At its peak, once the run is under way."""
    if step.shards == 1:
        return _count(step, None)
    with _absent_processes(step.shards) as mesh:
        return _count(step, mesh)


def _count(step: StepShape, mesh: DeviceMesh | None) -> MemoryBreakdown:
    dtype, low = PRECISIONS[step.precision]
    live = _Live(Heap() if step.device == "cpu" else None)
    with FakeTensorMode(), live, ExitStack() as modes:
        with _default_dtype(dtype):
            training = _Training(step, live.enter)
        idx, targets = torch.zeros(2, step.batch_size, step.length, dtype=torch.int64)
        if step.device == "cuda":
            modes.enter_context(as_on_cuda(low, loss_kernel=step.loss_kernel))
        if mesh is not None:
            _shard(training, mesh, low)
        parameters = list(training.parameters())
        live.tag(parameters, "weights")
        if mesh is None:
            for p in parameters:
                p.register_post_accumulate_grad_hook(lambda p: live.tag([p.grad], "gradients"))

        def update() -> None:
            if step.accumulate:
                # FSDP2 keeps whole gradients until the last micro-batch
                _sync_gradients(training, False)
                _forward_and_backward(training, idx, targets, low, live, zero=True)
                _sync_gradients(training, True)
                if mesh is not None:
                    live.rename("backward", "gathered")
            _forward_and_backward(training, idx, targets, low, live, zero=not step.accumulate)
            live.tag([p.grad for p in parameters if p.grad is not None], "gradients")

        update()
        live.enter("moments")
        moments = [torch.zeros_like(p) for p in parameters for _ in range(2)]
        live.tag(parameters, "weights")
        live.peak.clear()
        for _ in range(UPDATES if step.device == "cpu" else 1):
            update()
        del moments
    at_peak = {name: live.peak[name] for name in MemoryBreakdown.__annotations__ if name != "phase"}
    return MemoryBreakdown(**at_peak, phase=live.peak_phase)


def _sync_gradients(training: nn.Module, whether: bool) -> None:
    if isinstance(training, FSDPModule):
        training.set_requires_gradient_sync(whether)


def _forward_and_backward(
    training: nn.Module,
    idx: Tensor,
    targets: Tensor,
    low: torch.dtype | None,
    live: "_Live",
    *,
    zero: bool,
) -> None:
    """In Lightning's order: the gradients before are dropped between the two passes."""
    live.enter("activations")
    with nullcontext() if low is None else torch.autocast("cpu", low):
        loss = training(idx, targets)
    if zero:
        training.zero_grad()
    loss.backward()
    if live.heap is not None:
        live.heap.give_scraps()


class _Training(nn.Module):
    """A micro-batch's forward pass and loss, as ``GPTLightningModule`` computes them."""

    def __init__(self, step: StepShape, enter: Callable[[str], None]) -> None:
        super().__init__()
        self.step = step
        self.enter = enter
        self.model = GPTModel(step.config)
        self.model.activation_checkpointing = step.activation_checkpointing

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        features = self.model.features(idx)
        features.register_hook(lambda grad: self.enter("backward"))
        self.enter("loss")
        chunk = self.step.loss_chunk_size
        if chunk is None:
            return cross_entropy(self.model.head(features), targets)
        return chunked_cross_entropy(
            features,
            self.model.head_weight,
            targets,
            chunk,
            pad_vocabulary=self.step.device == "cuda",
        )


class _Live(TorchDispatchMode):
    """Bytes of all storages that are there, by what they are for.

    Attributes:
        bytes: Of each kind, now.
        peak: The same when the sum was highest.
    """

    def __init__(self, heap: Heap | None) -> None:
        super().__init__()
        self.heap = heap
        self.bytes: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.peak_phase = ""
        self.phase = "weights"
        self._storages: dict[int, tuple[str, int]] = {}

    def __enter__(self) -> "_Live":
        self._resize = torch.UntypedStorage.resize_
        live = self

        def resize(storage: torch.UntypedStorage, size: int) -> Any:  # how FSDP2 frees and takes
            found = live._resize(storage, size)
            live._set(storage, "gathered")
            return found

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def enter(self, phase: str) -> None:
        self.phase = phase

    def tag(self, tensors: list[Any], kind: str) -> None:
        """What these are for is known better now than when they were made."""
        for tensor in tensors:
            self._set(_local(tensor).untyped_storage(), kind)

    def rename(self, kind: str, to: str) -> None:
        self._storages = {
            key: (to if was == kind else was, size) for key, (was, size) in self._storages.items()
        }
        self.bytes[to] += self.bytes.pop(kind, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = self._kind(func, args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = _local(tensor).untyped_storage()
                if storage._cdata not in self._storages:
                    self._set(storage, kind)
        return out

    def _kind(self, func: Any, args: tuple[Any, ...]) -> str:
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            return "copies"
        if self.phase == "activations" and not torch.is_grad_enabled():
            return "gathered"  # by FSDP2's hooks
        return self.phase

    def _set(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        before, was = self._storages.get(key, (kind, None))
        if was is None:
            weakref.finalize(storage, self._forget, key)
        self.bytes[before] -= was or 0
        self.bytes[kind] += size
        self._storages[key] = kind, size
        if self.heap is not None and size != was:
            if was is not None:
                self.heap.give(key)
            self.heap.take(key, size)
        total = self.bytes.total() if self.heap is None else self.heap.resident
        if total > self.peak.total():
            self.peak = self.bytes.copy()
            self.peak["kept"] = total - self.bytes.total()
            self.peak_phase = "forward" if self.phase == "activations" else self.phase

    def _forget(self, key: int) -> None:
        kind, size = self._storages.pop(key)
        self.bytes[kind] -= size
        if self.heap is not None:
            self.heap.give(key)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@contextmanager
def _absent_processes(count: int) -> Iterator[DeviceMesh]:
    """A mesh of ``count`` devices, of which this process plays the first; what they would send is not sent."""
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()


def _shard(training: _Training, mesh: DeviceMesh, low: torch.dtype | None) -> None:
    """Each block a group of its own, embeddings, head and last norm together in the root."""
    policy = MixedPrecisionPolicy()
    if low is not None:
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for block in training.model.trf_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(training, mesh=mesh, mp_policy=policy)
