"""What a run will take: memory, disk, time; and what to change where it does not fit. Runs nothing."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from math import ceil
from typing import Literal

from gpt_lightning.data.epochs import EpochShape
from gpt_lightning.model import flops as cost
from gpt_lightning.model.precision import PRECISIONS, SHARDED_PRECISIONS
from gpt_lightning.planning.memory import MemoryBreakdown, StepShape, held

Strategy = Literal["single", "ddp", "fsdp"]

CHUNK = 1024  # tokens whose logits are held, where chunks are proposed
MOMENTS = 2  # of AdamW, for each weight


@dataclass(frozen=True)
class RunSpec:
    """A run as far as it decides what it costs.

    Attributes:
        step: One micro-batch on one device.
        devices: Over all machines.
        strategy: 'single' device, 'ddp' (each device holds everything) or 'fsdp' (FSDP2: each a share).
        micro_batches: Accumulated on a device for one update.
        global_batch_is_given: Whether ``micro_batches`` follow from it, so that no option names them.
        bucket_view: Whether DDP's gradients lie in its buckets, rather than be copied to them.
        base: Bytes of the process itself, Python and its libraries; none on a GPU.
        keep_best: Whether best.ckpt is kept; until it is written it is a copy in main memory.
        keep_previous: Whether previous.ckpt is.
        async_save: Whether a copy is written while training goes on.
    """

    step: StepShape
    devices: int = 1
    strategy: Strategy = "single"
    micro_batches: int = 1
    global_batch_is_given: bool = False
    bucket_view: bool = False
    base: int = 0
    keep_best: bool = True
    keep_previous: bool = True
    async_save: bool = False

    @property
    def tokens_per_update(self) -> int:
        return self.step.batch_size * self.step.length * self.devices * self.micro_batches


@dataclass(frozen=True)
class SuggestedChange:
    """Another setting that fits.

    Attributes:
        options: To add to the command.
        total: Bytes a device then holds.
    """

    options: tuple[str, ...]
    total: int


@dataclass(frozen=True)
class Plan:
    """Bytes, unless said otherwise.

    Attributes:
        memory: What one device holds at its peak, part by part; they are there at the same time.
        peak: When that is: in the forward pass, the loss, the backward pass or the optimizer's step.
        main_memory: Copies of checkpoints, which on a GPU lie beside it; on a CPU they are in ``memory``.
        kv_cache: Of generating one text of the full context in float32.
        checkpoint: One file.
        disk: All files of a run, and the one being written.
        updates: Of the optimizer, for ``tokens``.
        updates_per_epoch, epochs: Of the run; None: the text is not here.
        hours: For ``tokens``, at ``mfu`` of ``peak_flops`` a device.
        device_memory: What a device has; none: not known.
        nearest: What to change where it does not fit; none: it fits, or nothing that plan knows is enough.
        least: What remains with all that plan knows, where that is not enough.
    """

    parameters: int
    embedding_parameters: int
    block_parameters: int
    flops_per_token: int
    memory: dict[str, int]
    total: int
    peak: str
    main_memory: int
    kv_cache: int
    checkpoint: int
    disk: int
    tokens_per_update: int
    tokens: int | None
    updates: int | None
    updates_per_epoch: int | None
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
    setting: RunSpec,
    *,
    tokens: int | None = None,
    updates: int | None = None,
    epoch: EpochShape | None = None,
    peak_flops: float | None = None,
    mfu: float = 0.4,
    device_memory: int | None = None,
) -> Plan:
    """Count it all.

    Args:
        tokens: To train on.
        updates: Of the optimizer in that; None: as many as have all of ``tokens_per_update``.
        epoch: What an epoch has; None: the text is not here.
        peak_flops: FLOP/s of one device at most; none: no time is told.
        mfu: Share of the peak that the run reaches.
        device_memory: Bytes that one device has; none: it is not said what fits.
    """
    config, step = setting.step.config, setting.step
    if updates is None and tokens is not None:
        updates = ceil(tokens / setting.tokens_per_update)
    lines, when = memory(setting)
    total = sum(lines.values())
    per_token = cost.flops_per_token(config, step.length)
    flops = None if tokens is None else float(tokens) * per_token
    hours = None
    if flops is not None and peak_flops is not None:
        hours = flops / (peak_flops * mfu * setting.devices) / 3600
    fits = None if device_memory is None else total <= device_memory
    nearest, least = None, None
    if device_memory is not None and not fits:
        nearest, least = nearest_that_fits(setting, device_memory)
    checkpoint = checkpoint_bytes(setting)
    return Plan(
        parameters=cost.parameters(config),
        embedding_parameters=cost.embedding_parameters(config),
        block_parameters=cost.block_parameters(config),
        flops_per_token=per_token,
        memory=lines,
        total=total,
        peak=when,
        main_memory=_copies(setting),
        kv_cache=cost.kv_cache_bytes(config, 1, config.context_length),
        checkpoint=checkpoint,
        disk=(2 + setting.keep_best + setting.keep_previous) * checkpoint,
        tokens_per_update=setting.tokens_per_update,
        tokens=tokens,
        updates=updates,
        updates_per_epoch=None if epoch is None else epoch.steps,
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


def memory(setting: RunSpec) -> tuple[dict[str, int], str]:
    """What one device holds at its peak, part by part, and when that is."""
    step = replace(
        setting.step,
        accumulate=setting.micro_batches > 1,
        shards=setting.devices if setting.strategy == "fsdp" else 1,
    )
    counted = _held(step)
    lines = {
        "weights": counted.weights,
        "gradients": counted.gradients,
        "optimizer": counted.moments,
        "weights in autocast's precision": counted.copies,
        "gathered shards": counted.gathered,
        "activations": counted.activations,
        "logits and loss": counted.loss,
        "backward pass": counted.backward,
        "kept by malloc": counted.kept,
    }
    when = counted.phase
    if step.precision == "16-mixed" and step.device == "cuda":
        # its optimizer is not fused, and takes a value a weight more when all activations are gone
        stepping = {"weights": counted.weights, "gradients": counted.weights,
                    "optimizer": counted.moments, "optimizer's step": counted.weights}  # fmt: skip
        if sum(stepping.values()) > counted.total:
            lines, when = stepping, "optimizer's step"
    if setting.strategy == "ddp" and not setting.bucket_view:
        lines["DDP's buckets"] = counted.weights
    if step.device == "cpu":
        lines = {"Python and libraries": setting.base, **lines}
        lines["checkpoint copies"] = _copies(setting)
    return {name: size for name, size in lines.items() if size}, when


def checkpoint_bytes(setting: RunSpec) -> int:
    """Weights and moments in the precision in which they are kept."""
    itemsize = PRECISIONS[setting.step.precision][0].itemsize
    return (1 + MOMENTS) * itemsize * cost.parameters(setting.step.config)


def _copies(setting: RunSpec) -> int:
    """In main memory: the best one, the one being written, and with FSDP2 the whole one that is saved."""
    copies = setting.keep_best + setting.async_save + (setting.strategy == "fsdp")
    return copies * checkpoint_bytes(setting)


def nearest_that_fits(setting: RunSpec, room: int) -> tuple[SuggestedChange | None, int | None]:
    """The fewest changes after which a device holds no more than ``room``, at the same global batch.

    Tried in this order, alone, then two together and so on: a smaller batch with more accumulation, the loss by
    chunks, activations computed again, FSDP2, bf16-mixed, no copy of the best checkpoint. Where all of it is not
    enough: none, and the least that remains.
    """
    levers = _levers(setting)
    least = _least(setting, levers)
    if least > room:
        return None, least
    for count in range(1, len(levers) + 1):
        for chosen in combinations(levers, count):
            found = _with(setting, chosen, room)
            if found is not None:
                return found, None
    return None, least


def _least(setting: RunSpec, levers: list[str]) -> int:
    """With one window at a time and all changes, but for those that cost memory where there is little to save."""
    sure = tuple(lever for lever in levers if lever not in ("batch", "chunks", "bf16"))
    doubtful = [lever for lever in levers if lever in ("chunks", "bf16")]
    return min(
        _total(_smaller(_changed(setting, (*sure, *some))[0], 1))
        for count in range(len(doubtful) + 1)
        for some in combinations(doubtful, count)
    )


def _levers(setting: RunSpec) -> list[str]:
    step = setting.step
    there = {
        "batch": step.batch_size > 1,
        "chunks": step.loss_chunk_size is None or step.loss_chunk_size > CHUNK,
        "checkpointing": not step.activation_checkpointing,
        "fsdp": setting.devices > 1
        and setting.strategy != "fsdp"
        and step.precision in SHARDED_PRECISIONS,
        "bf16": step.precision == "32-true",
        "no copies": step.device == "cpu" and (setting.keep_best or setting.async_save),
    }
    return [lever for lever, possible in there.items() if possible]


def _with(setting: RunSpec, levers: tuple[str, ...], room: int) -> SuggestedChange | None:
    changed, options = _changed(setting, levers)
    if "batch" not in levers:
        total = _total(changed)
        return SuggestedChange(tuple(options), total) if total <= room else None
    sizes = [b for b in range(1, setting.step.batch_size) if setting.step.batch_size % b == 0]
    best: RunSpec | None = None
    while sizes:  # the more windows, the more memory
        middle = len(sizes) // 2
        tried = _smaller(changed, sizes[middle])
        if _total(tried) <= room:
            best, sizes = tried, sizes[middle + 1 :]
        else:
            sizes = sizes[:middle]
    if best is None:
        return None
    options = [f"--data.batch_size {best.step.batch_size}", *options]
    if not setting.global_batch_is_given:
        options.insert(1, f"--trainer.accumulate_grad_batches {best.micro_batches}")
    return SuggestedChange(tuple(options), _total(best))


def _changed(setting: RunSpec, levers: tuple[str, ...]) -> tuple[RunSpec, list[str]]:
    """With all but the batch's size changed."""
    step, options = setting.step, []
    for lever in levers:
        match lever:
            case "chunks":
                step = replace(step, loss_chunk_size=CHUNK)
                options.append(f"--model.loss_chunk_size {CHUNK}")
            case "checkpointing":
                step = replace(step, activation_checkpointing=True)
                options.append("--model.activation_checkpointing true")
            case "fsdp":
                setting = replace(setting, strategy="fsdp")
                step = replace(step, activation_checkpointing=True)  # as that file has it
                options.append("--config configs/fsdp.yaml")
                if "bf16" not in levers and step.precision != "bf16-mixed":  # which that file sets
                    options.append(f"--trainer.precision {step.precision}")
            case "bf16":
                step = replace(step, precision="bf16-mixed")
                options.append("--trainer.precision bf16-mixed")
            case "no copies":
                setting = replace(setting, keep_best=False, async_save=False)
                options += ["--checkpoint.save_best false", "--checkpoint.async_save false"]
    return replace(setting, step=step), options


def _smaller(setting: RunSpec, batch_size: int) -> RunSpec:
    before = setting.step.batch_size
    return replace(
        setting,
        step=replace(setting.step, batch_size=batch_size),
        micro_batches=setting.micro_batches * before // batch_size,
    )


def _total(setting: RunSpec) -> int:
    return sum(memory(setting)[0].values())


@lru_cache(maxsize=256)
def _held(step: StepShape) -> MemoryBreakdown:
    return held(step)
