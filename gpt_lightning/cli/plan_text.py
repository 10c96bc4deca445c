"""The text of a plan: a table of the memory, and a line for each other number."""

from gpt_lightning.cli.console import print_table
from gpt_lightning.model.precision import SHARDED_PRECISIONS
from gpt_lightning.planning.plan import Plan, RunSpec
from gpt_lightning.training.schedule import Schedule, Steps


def print_plan(plan: Plan, spec: RunSpec, notes: dict[str, str]) -> None:
    """Print the plan; ``notes`` are further lines by their topic."""
    step = spec.step
    print(
        f"{plan.parameters:,} parameters: {plan.embedding_parameters:,} in embeddings, "
        f"{step.config.n_layers} blocks of {plan.block_parameters:,}; "
        f"{plan.flops_per_token / 1e6:,.1f} MFLOP per token, forward and backward"
    )
    if plan.optimizer_flops:
        per_device = plan.flops_per_token * plan.tokens_per_step / spec.devices
        print(
            f"Muon: {plan.optimizer_flops / 1e9:,.1f} GFLOP per optimizer step on each device, "
            f"{plan.optimizer_flops / per_device:.1%} of its other FLOPs"
        )
    strategy = {"single": "one device", "ddp": "DDP", "fsdp": "FSDP2"}[spec.strategy]
    print_table(
        f"\none device of {spec.devices} ({strategy}, {step.device}, {step.precision}, "
        f"{step.batch_size} × {step.length} tokens) at its peak, {_PHASES[plan.peak]}",
        [
            {"memory": name, "GB": f"{size / 1e9:,.3f}"}
            for name, size in {**plan.memory, "total": plan.total}.items()
        ],
        texts=["memory"],
    )
    rows = {
        "tokens per step": f"{plan.tokens_per_step:,} ({step.batch_size} windows × "
        f"{spec.devices} devices × {spec.micro_batches} micro-batches)",
        "optimizer steps": "not known: give --train_tokens"
        if plan.steps is None
        else f"{plan.steps:,} for {plan.tokens:,} tokens",
        "epochs": _epochs(plan),
        "time": _time(plan, spec),
        "a checkpoint": f"{plan.checkpoint / 1e9:,.2f} GB; on disk {plan.disk / 1e9:,.2f} GB at most",
        "KV cache": f"{plan.kv_cache / 1e6:,.1f} MB in float32: one text of "
        f"{step.config.context_length:,} tokens",
    }
    if step.device == "cuda" and plan.main_memory:
        rows["main memory"] = (
            f"{plan.main_memory / 1e9:,.2f} GB on the first process for checkpoints"
        )
    rows |= notes
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    print(f"{'verdict':<{width}}  {_verdict(plan, step.precision)}")


def describe_schedule(schedule: Schedule, clip_norm: float | None) -> dict[str, str]:
    """Lines about learning rate and clipping; a share of the run stays a share if its length is not known."""
    rate = f"{schedule.lr:g}"
    warmup, first = schedule.warmup_steps, schedule.initial_lr
    if warmup and first is not None:
        rate = f"{first:g} to {rate} at {_step(warmup)}"
    elif isinstance(warmup, int) and warmup > 1:
        rate = f"{schedule.lr / warmup:g} to {rate} at {_step(warmup - 1)}"
    elif isinstance(warmup, float) and warmup:
        rate = f"rises to {rate} at {_step(warmup)}"
    if schedule.lr_schedule == "inverse_sqrt":
        rate += ", then it falls with the inverse square root of the step"
        if schedule.min_lr:
            rate += f", not below {schedule.min_lr:g}"
    elif schedule.decay_steps is not None:
        rate += f", then {_decay(schedule)} to {schedule.min_lr:g} at {_step(schedule.decay_steps)}"
    lines = {"learning rate": rate}
    if clip_norm is not None:
        start = schedule.clip_from_step
        lines["clipping"] = f"to {clip_norm:g}" + (f" from {_step(start)} on" if start else "")
    return lines


def _decay(schedule: Schedule) -> str:
    if schedule.lr_schedule != "wsd":
        return "a cosine" if schedule.lr_schedule == "cosine" else "linear"
    shape = "a cosine" if schedule.decay_type == "cosine" else schedule.decay_type
    if isinstance(schedule.decay_steps, int) and isinstance(schedule.warmup_steps, int):
        return f"constant until step {schedule.decay_start}, then {shape}"
    return f"constant, and in the last {schedule.decay_fraction:.3g} of the decay's steps {shape}"


def _step(value: Steps) -> str:
    return f"{value:.3g} of the run" if isinstance(value, float) else f"step {value}"


MANY_EPOCHS = 40

_PHASES = {
    "loss": "in the loss",
    "backward": "in the backward pass",
    "optimizer step": "in the optimizer step",
}


def _epochs(plan: Plan) -> str:
    if plan.epochs is None:
        return "not known: the text is not here"
    warning = "; so many passes usually overfit" if plan.epochs > MANY_EPOCHS else ""
    return f"{plan.epochs:,.4g} of {plan.steps_per_epoch:,} steps each{warning}"


def _time(plan: Plan, spec: RunSpec) -> str:
    if plan.tokens is None:
        return "not known: give --train_tokens"
    if plan.hours is None or plan.peak_flops is None:
        return "not known: give --peak_tflops TFLOPS, or --gpu"
    time = f"{plan.hours:,.1f} hours" if plan.hours >= 1 else f"{60 * plan.hours:,.1f} minutes"
    return f"{time} at {plan.mfu:.0%} of {plan.peak_flops / 1e12:,.3g} TFLOP/s × {spec.devices}"


def _verdict(plan: Plan, precision: str) -> str:
    if plan.device_memory is None:
        return "the memory of a device is not known; give --gpu or --device_memory_gb"
    limit = f"{plan.device_memory / 1e9:,.2f} GB"
    if plan.fits:
        return f"fits {limit}"
    if plan.nearest is None:
        assert plan.least is not None
        can_shard = precision in SHARDED_PRECISIONS
        return (
            f"does not fit {limit}, nor with all changes that plan knows ({plan.least / 1e9:,.2f} GB); "
            f"use a larger device{', or more devices with FSDP2' if can_shard else ''}"
        )
    return f"does not fit {limit}; {plan.nearest.total / 1e9:,.2f} GB with {' '.join(plan.nearest.options)}"
