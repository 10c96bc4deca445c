"""``report speed``: the training speed of the book's model and of one improvement after the other."""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpt_lightning.cli.console import output_folder, print_table, progress, write_csv

if TYPE_CHECKING:
    from gpt_lightning.reports.speed import SpeedTask
    from gpt_lightning.training.config import RunConfig

CHUNK_SIZE = 8192  # tokens, if the settings have no model.loss_chunk_size


def run(arguments: list[str]) -> int:
    """Train the book's model for some steps, then with one improvement after the other, and compare the speed.

    Accepts the settings of fit (--config, --data.text, --data.batch_size, ...). Every row trains from the same weights
    on the same windows, without dropout, and its losses must be those of the first row up to rounding. A change that is
    slower on this machine is left out of the next rows. With --out, the command also writes a figure (PNG), CSV and
    JSON. Nothing is saved of the training. Of the settings only the architecture, text, batch size, learning rate,
    weight decay, seed and chunk size have an effect.
    """
    from gpt_lightning.cli.training_cli import TrainingCLI

    cli = TrainingCLI("report speed", arguments, run.__doc__)
    for name in ("ckpt_path", "init_from"):
        if cli.config[name] is not None:
            raise ValueError(f"{name}: report speed starts from random weights; leave it out")
    if not 0 < cli.config.minutes < float("inf"):
        raise ValueError(f"minutes: {cli.config.minutes} is out of range; give more than 0")
    task = _task(cli.run_config())
    with output_folder(cli.config.out) if cli.config.out else nullcontext() as out:
        return _report(task, cli.config.minutes, out, as_json=cli.config.json)


def _report(task: "SpeedTask", minutes: float, out: Path | None, *, as_json: bool) -> int:
    """Measure the rows, write the report to ``out`` and print it."""
    import torch

    from gpt_lightning.reports.speed import improvements, measure_all
    from gpt_lightning.reports.speed_results import as_dict, speed_figure

    with progress("rows", len(list(improvements(task.device))) + 1) as advance:
        rows = measure_all(task, 60 * minutes, advance)
    device = (
        torch.cuda.get_device_name()
        if task.device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    settings = {
        **asdict(task.config), "batch_size": task.batch_size, "context": task.windows.shape[1] - 1,
        "lr": task.lr, "weight_decay": task.weight_decay, "seed": task.seed, "minutes": minutes,
        "device": device, "torch": torch.__version__,
    }  # fmt: skip
    caption = (
        f"{task.batch_size} windows of {settings['context']} tokens a step, {task.config.n_layers} blocks of width "
        f"{task.config.emb_dim}, {device}, torch {torch.__version__}"
    )
    answer = {**as_dict(rows), "settings": settings}
    if out is not None:
        write_csv(
            out / "speed.csv",
            [{**asdict(row), "losses": " ".join(map(str, row.losses))} for row in rows],
        )
        (out / "speed.json").write_text(json.dumps(answer, indent=1), encoding="utf-8")
        speed_figure(rows, caption).savefig(out / "speed.png", dpi=150)
    if as_json:
        print(json.dumps(answer))
    else:
        print_table(caption, [row.as_text() for row in rows], texts=["row", "note"])
    return 0 if all(row.is_equal is not False for row in rows) else 1


def _task(config: "RunConfig") -> "SpeedTask":
    """What the rows train, from the settings of a run."""
    import numpy as np
    import torch

    from gpt_lightning.data.dataset import WindowDataset
    from gpt_lightning.data.epochs import window_length
    from gpt_lightning.data.token_cache import read_splits
    from gpt_lightning.reports.speed import BATCH_FACTOR, MAX_STEPS, SpeedTask
    from gpt_lightning.training.build import build_modules
    from gpt_lightning.training.start import find_start

    start = find_start(config)
    architecture = start.architecture
    module, data = build_modules(config, architecture, start.tokenizer)
    accelerator = config.trainer.get("accelerator") or "auto"
    has_gpu = torch.cuda.is_available()
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise ValueError(f"trainer.accelerator: report speed knows cpu and gpu, not {accelerator}")
    if accelerator in ("gpu", "cuda") and not has_gpu:
        raise ValueError("trainer.accelerator: no GPU is available; give cpu, or auto")
    if data.mixture:
        raise ValueError("data.mixture: report speed reads one text; give data.text")
    length = window_length(data.context_length, architecture.context_length)
    tokens = read_splits(data.text, data.train_ratio, data.tokenizer)[0]
    windows = WindowDataset(tokens, length, data.stride or length)
    if not len(windows):
        raise ValueError(f"data.text: has no window of {length} tokens; give more text")
    count = min(len(windows), MAX_STEPS * BATCH_FACTOR * data.batch_size)
    return SpeedTask(
        config=replace(architecture, drop_rate=0.0, attn_drop_rate=None, emb_drop_rate=None),
        windows=windows.read(np.arange(count)),
        batch_size=data.batch_size,
        lr=module.schedule.lr,
        weight_decay=module.optimizer_config.weight_decay,
        seed=config.seed_everything,
        chunk_size=module.loss_chunk_size or CHUNK_SIZE,
        device="cuda" if has_gpu and accelerator != "cpu" else "cpu",
    )
