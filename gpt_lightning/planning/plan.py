"""What a run takes: memory, disk, time; and what to change where it does not fit. Runs nothing."""

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from gpt_lightning.data.epochs import EpochShape
from gpt_lightning.model import flops as cost
from gpt_lightning.model.precision import PRECISIONS, SHARDED_PRECISIONS
from gpt_lightning.planning.memory import step_memory
from gpt_lightning.planning.step_parts import StepShape

Strategy = Literal["single", "ddp", "fsdp"]

CHUNK = 1024  # tokens per chunk of the loss, where chunks are proposed
# On a CPU, memory that glibc's malloc keeps beside what is in use, as a share of all that a step allocates and
# frees: by keep_freed_memory. Fitted to runs of `fit`, see docs/planning.md
KEPT_BY_MALLOC = {True: 0.75, False: 0.3}

ENDLESS = 2**62  # steps


@dataclass(frozen=True)
class RunSpec:
    """A run as far as it decides what it costs.

    Attributes:
        step: One micro-batch on one device.
        devices: Over all machines.
        strategy: 'single' device, 'ddp' (each device holds everything) or 'fsdp' (FSDP2: each a share).
        micro_batches: Accumulated on a device for one step.
        global_batch_is_given: Whether ``micro_batches`` follow from it, so that no option names them.
        bucket_view: Whether DDP's gradients are views of its buckets, not copied to them.
        base: Bytes of the process itself, Python and its libraries; 0 on a GPU.
        keep_freed_memory: Whether a CPU's process keeps what a step has freed.
        keep_best: Whether best.ckpt is kept.
        keep_previous: Whether previous.ckpt is.
        kept_steps: Number of checkpoints that are kept at intervals, as step-000500.ckpt.
        async_save: Whether a copy is written while training continues.
        can_shard: Whether the optimizer works with FSDP2.
    """

    step: StepShape
    devices: int = 1
    strategy: Strategy = "single"
    micro_batches: int = 1
    global_batch_is_given: bool = False
    bucket_view: bool = False
    base: int = 0
    keep_freed_memory: bool = True
    keep_best: bool = True
    keep_previous: bool = True
    kept_steps: int = 0
    async_save: bool = False
    can_shard: bool = True

    @property
    def windows_per_batch(self) -> int:
        """Windows of one micro-batch on all devices."""
        return self.step.batch_size * self.devices

    def epoch(self, batches: int | None) -> EpochShape:
        """An epoch of so many micro-batches on each device; ``None``: the text is not here, so it never ends."""
        if batches is None:
            batches = ENDLESS * self.micro_batches
        return EpochShape(batches, self.micro_batches, self.windows_per_batch * self.step.length)


@dataclass(frozen=True)
class SuggestedChange:
    """Options with which the run fits.

    Attributes:
        options: To add to the command.
        total: Bytes that a device then holds.
    """

    options: tuple[str, ...]
    total: int


@dataclass(frozen=True)
class Plan:
    """What a run takes, in bytes unless stated otherwise.

    Attributes:
        optimizer_flops: Of an optimizer step's matrix products, which each device computes; 0 unless it is Muon.
        memory: What one device holds at its peak, part by part, at the same time.
        peak: When that is: "loss", "backward" or "optimizer step".
        main_memory: Copies of checkpoints, which a GPU's machine holds; on a CPU they are in ``memory``.
        kv_cache: For one text of the full context in float32.
        checkpoint: One file.
        disk: All files of a run, and the one being written.
        steps: Optimizer steps for ``tokens``.
        steps_per_epoch, epochs: Of the run; ``None``: the text is not here.
        hours: For ``tokens``, at ``mfu`` of ``peak_flops`` per device.
        device_memory: What a device has; ``None``: not known.
        nearest: What to change where it does not fit; ``None``: it fits, or no change that plan knows is enough.
        least: What remains with all changes that plan knows, where that is not enough.
    """

    parameters: int
    embedding_parameters: int
    block_parameters: int
    flops_per_token: int
    optimizer_flops: int
    memory: dict[str, int]
    total: int
    peak: str
    main_memory: int
    kv_cache: int
    checkpoint: int
    disk: int
    tokens_per_step: int
    tokens: int | None
    steps: int | None
    steps_per_epoch: int | None
    epochs: float | None
    flops: float | None
    peak_flops: float | None
    mfu: float
    hours: float | None
    device_memory: int | None
    fits: bool | None
    nearest: SuggestedChange | None
    least: int | None


def plan(
    spec: RunSpec,
    *,
    tokens: int | None = None,
    steps: int | None = None,
    epoch: EpochShape | None = None,
    peak_flops: float | None = None,
    mfu: float = 0.4,
    device_memory: int | None = None,
) -> Plan:
    """Memory, disk and time of a run.

    Args:
        tokens: To train on.
        steps: Optimizer steps for that; ``None``: as many as see all ``tokens``.
        epoch: What an epoch has; ``None``: the text is not here.
        peak_flops: Highest FLOP/s of one device; ``None``: the time is not known.
        mfu: Share of the peak that the run reaches.
        device_memory: Bytes that one device has; ``None``: whether the run fits is not known.
    """
    config, step = spec.step.config, spec.step
    endless = spec.epoch(None)
    if steps is None and tokens is not None:
        steps = (epoch or endless).steps_for(tokens)
    lines, phase = memory(spec)
    total = sum(lines.values())
    per_token = cost.flops_per_token(config, step.length)
    optimizer_flops = cost.muon_flops(config) if step.muon else 0
    flops = None
    if tokens is not None:
        assert steps is not None
        flops = float(tokens) * per_token + float(steps) * optimizer_flops * spec.devices
    hours = None
    if flops is not None and peak_flops is not None:
        hours = flops / (peak_flops * mfu * spec.devices) / 3600
    fits = None if device_memory is None else total <= device_memory
    nearest, least = None, None
    if device_memory is not None and not fits:
        nearest, least = nearest_that_fits(spec, device_memory)
    checkpoint = checkpoint_bytes(spec)
    return Plan(
        parameters=cost.parameters(config),
        embedding_parameters=cost.embedding_parameters(config),
        block_parameters=cost.block_parameters(config),
        flops_per_token=per_token,
        optimizer_flops=optimizer_flops,
        memory=lines,
        total=total,
        peak=phase,
        main_memory=_checkpoint_copies(spec),
        kv_cache=cost.kv_cache_bytes(config, 1, config.context_length),
        checkpoint=checkpoint,
        disk=(2 + spec.keep_best + spec.keep_previous + spec.kept_steps) * checkpoint,
        tokens_per_step=endless.tokens_after(1),
        tokens=tokens,
        steps=steps,
        steps_per_epoch=None if epoch is None else epoch.steps,
        epochs=None if epoch is None or tokens is None else tokens / epoch.tokens,
        flops=flops,
        peak_flops=peak_flops,
        mfu=mfu,
        hours=hours,
        device_memory=device_memory,
        fits=fits,
        nearest=nearest,
        least=least,
    )


def memory(spec: RunSpec) -> tuple[dict[str, int], str]:
    """What one device holds at its peak, part by part, and when that is."""
    step = replace(
        spec.step,
        accumulate=spec.micro_batches > 1,
        shards=spec.devices if spec.strategy == "fsdp" else 1,
    )
    counted = step_memory(step)
    lines = {
        "weights": counted.weights,
        "gradients": counted.gradients,
        "optimizer": counted.moments,
        "average of weights (EMA)": counted.ema,
        "weights in autocast's precision": counted.copies,
        "gathered shards": counted.gathered,
        "activations": counted.activations,
        "logits and loss": counted.loss,
        "backward pass": counted.backward,
        "optimizer step": counted.optimizer_step,
    }
    if spec.strategy == "ddp" and not spec.bucket_view:
        lines["DDP's buckets"] = counted.weights  # a copy of all gradients
    if step.device == "cpu":
        gradients = counted.weights  # all of them, at another moment than the peak
        freed = gradients + counted.copies + counted.activations + counted.loss + counted.backward
        kept = round(KEPT_BY_MALLOC[spec.keep_freed_memory] * freed)
        lines = {"Python and libraries": spec.base, **lines, "kept by malloc": kept}
        lines["checkpoint copies"] = _checkpoint_copies(spec)
    return {name: size for name, size in lines.items() if size}, counted.phase


def checkpoint_bytes(spec: RunSpec) -> int:
    """Bytes of weights and the optimizer's state, in the type of the weights, and of the weights' average."""
    itemsize = PRECISIONS[spec.step.precision][0].itemsize
    weights, state = cost.parameters(spec.step.config), spec.step.state_values
    average = max(4, itemsize) * weights * spec.step.ema
    return itemsize * (weights + (2 * weights if state is None else state)) + average


def _checkpoint_copies(spec: RunSpec) -> int:
    """Bytes in main memory: of the one being written, and FSDP2's complete one."""
    copies = spec.async_save + (spec.strategy == "fsdp")
    return copies * checkpoint_bytes(spec)


def nearest_that_fits(spec: RunSpec, limit: int) -> tuple[SuggestedChange | None, int | None]:
    """The fewest changes after which a device holds at most ``limit`` bytes, at the same global batch.

    The order is, one change alone, then two together and so on: a smaller batch with more accumulation, the loss
    by chunks, activation checkpointing, FSDP2, bf16-mixed, no asynchronous save. Where all of them are not
    enough: None, and the least that remains.
    """
    levers = _levers(spec)
    least = _least(spec, levers)
    if least > limit:
        return None, least
    for count in range(1, len(levers) + 1):
        for chosen in combinations(levers, count):
            change = _change_that_fits(spec, chosen, limit)
            if change is not None:
                return change, None
    return None, least


def _least(spec: RunSpec, levers: list[str]) -> int:
    """Bytes with one window per micro-batch and all changes that help; chunks and bf16 can cost a small model memory."""
    sure = tuple(lever for lever in levers if lever not in ("batch", "chunks", "bf16"))
    doubtful = [lever for lever in levers if lever in ("chunks", "bf16")]
    return min(
        _total(_smaller(_changed(spec, (*sure, *some))[0], 1))
        for count in range(len(doubtful) + 1)
        for some in combinations(doubtful, count)
    )


def _levers(spec: RunSpec) -> list[str]:
    step = spec.step
    possible = {
        "batch": step.batch_size > 1,
        "chunks": step.loss_chunk_size is None or step.loss_chunk_size > CHUNK,
        "checkpointing": not step.activation_checkpointing,
        "fsdp": spec.devices > 1
        and spec.strategy != "fsdp"
        and spec.can_shard
        and step.precision in SHARDED_PRECISIONS,
        # a GPU that is too old for our kernels has no bfloat16
        "bf16": step.precision == "32-true" and (step.device == "cpu" or step.loss_kernel),
        "no copy": step.device == "cpu" and spec.async_save,
    }
    return [lever for lever, is_possible in possible.items() if is_possible]


def _change_that_fits(spec: RunSpec, levers: tuple[str, ...], limit: int) -> SuggestedChange | None:
    changed, options = _changed(spec, levers)
    if "batch" not in levers:
        total = _total(changed)
        return SuggestedChange(tuple(options), total) if total <= limit else None
    sizes = [b for b in range(1, spec.step.batch_size) if spec.step.batch_size % b == 0]
    best: RunSpec | None = None
    while sizes:  # the more windows, the more memory
        middle = len(sizes) // 2
        tried = _smaller(changed, sizes[middle])
        if _total(tried) <= limit:
            best, sizes = tried, sizes[middle + 1 :]
        else:
            sizes = sizes[:middle]
    if best is None:
        return None
    options = [f"--data.batch_size {best.step.batch_size}", *options]
    if not spec.global_batch_is_given:
        options.insert(1, f"--trainer.accumulate_grad_batches {best.micro_batches}")
    return SuggestedChange(tuple(options), _total(best))


def _changed(spec: RunSpec, levers: tuple[str, ...]) -> tuple[RunSpec, list[str]]:
    """The spec with all changes but the batch size, and their options."""
    step, options = spec.step, []
    for lever in levers:
        match lever:
            case "chunks":
                step = replace(step, loss_chunk_size=CHUNK)
                options.append(f"--model.loss_chunk_size {CHUNK}")
            case "checkpointing":
                step = replace(step, activation_checkpointing=True)
                options.append("--model.activation_checkpointing true")
            case "fsdp":
                spec = replace(spec, strategy="fsdp")
                step = replace(step, activation_checkpointing=True)  # as that file has it
                options.append("--config configs/fsdp.yaml")
                if "bf16" not in levers and step.precision != "bf16-mixed":  # which that file sets
                    options.append(f"--trainer.precision {step.precision}")
            case "bf16":
                step = replace(step, precision="bf16-mixed")
                options.append("--trainer.precision bf16-mixed")
            case "no copy":
                spec = replace(spec, async_save=False)
                options.append("--checkpoint.async_save false")
    return replace(spec, step=step), options


def _smaller(spec: RunSpec, batch_size: int) -> RunSpec:
    before = spec.step.batch_size
    return replace(
        spec,
        step=replace(spec.step, batch_size=batch_size),
        micro_batches=spec.micro_batches * before // batch_size,
    )


def _total(spec: RunSpec) -> int:
    return sum(memory(spec)[0].values())
