"""A plan for people: a table of the memory, lines for the rest."""

from gpt_lightning.cli.console import print_table
from gpt_lightning.model.precision import SHARDED_PRECISIONS
from gpt_lightning.planning.plan import Plan, RunSpec


def print_plan(found: Plan, setting: RunSpec, notes: dict[str, str]) -> None:
    """``notes``: further lines, by what they are about."""
    step = setting.step
    print(
        f"{found.parameters:,} parameters: {found.embedding_parameters:,} in embeddings, "
        f"{step.config.n_layers} blocks of {found.block_parameters:,}; "
        f"{found.flops_per_token / 1e6:,.1f} MFLOP a token, forward and backward"
    )
    where = {"single": "one device", "ddp": "DDP", "fsdp": "FSDP2"}[setting.strategy]
    print_table(
        f"\none device of {setting.devices} ({where}, {step.device}, {step.precision}, "
        f"{step.batch_size} × {step.length} tokens) at its peak, {_WHEN[found.peak]}",
        [
            {"memory": name, "GB": f"{size / 1e9:,.3f}"}
            for name, size in {**found.memory, "in all": found.total}.items()
        ],
        texts=["memory"],
    )
    rows = {
        "tokens an update": f"{found.tokens_per_update:,} ({step.batch_size} windows × "
        f"{setting.devices} devices × {setting.micro_batches} micro-batches)",
        "updates": "not known: give --train_tokens"
        if found.updates is None
        else f"{found.updates:,} for {found.tokens:,} tokens",
        "epochs": _epochs(found),
        "time": _time(found, setting),
        "a checkpoint": f"{found.checkpoint / 1e9:,.2f} GB; on disk {found.disk / 1e9:,.2f} GB at most",
        "KV cache": f"{found.kv_cache / 1e6:,.1f} MB in float32: one text of "
        f"{step.config.context_length:,} tokens",
    }
    if step.device == "cuda" and found.main_memory:
        rows["main memory"] = (
            f"{found.main_memory / 1e9:,.2f} GB on the first process for checkpoints"
        )
    rows |= notes
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    print(f"{'verdict':<{width}}  {_verdict(found, step.precision)}")


MANY_EPOCHS = 40

_WHEN = {
    "forward": "in the forward pass",
    "loss": "in the loss",
    "backward": "in the backward pass",
    "optimizer's step": "in the optimizer's step",
}


def _epochs(found: Plan) -> str:
    if found.epochs is None:
        return "not known: the text is not here"
    often = "; so many passes usually overfit" if found.epochs > MANY_EPOCHS else ""
    return f"{found.epochs:,.4g} of {found.updates_per_epoch:,} updates each{often}"


def _time(found: Plan, setting: RunSpec) -> str:
    if found.tokens is None:
        return "not known: give --train_tokens"
    if found.hours is None or found.peak_flops is None:
        return "not known: give --peak_tflops TFLOPS, or --gpu"
    shown = f"{found.hours:,.1f} hours" if found.hours >= 1 else f"{60 * found.hours:,.1f} minutes"
    return (
        f"{shown} at {found.mfu:.0%} of {found.peak_flops / 1e12:,.3g} TFLOP/s × {setting.devices}"
    )


def _verdict(found: Plan, precision: str) -> str:
    if found.device_memory is None:
        return "what a device has is not known; give --gpu or --device_memory_gb"
    room = f"{found.device_memory / 1e9:,.2f} GB"
    if found.fits:
        return f"fits {room}"
    if found.nearest is None:
        assert found.least is not None
        can_shard = precision in SHARDED_PRECISIONS
        return (
            f"does not fit {room}, nor with all that plan knows ({found.least / 1e9:,.2f} GB); "
            f"take a larger device{', or more of them with FSDP2' if can_shard else ''}"
        )
    return f"does not fit {room}; {found.nearest.total / 1e9:,.2f} GB with {' '.join(found.nearest.options)}"
