"""Learning rate and clipping: functions of the step, from numbers of steps or shares of the run."""

import math
import random
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from forked_runs import Runs, Stop
from gpt_lightning.data.epochs import EpochShape
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.run_files import read_rows
from gpt_lightning.training.run_length import Progress, run_steps
from gpt_lightning.training.schedule import Schedule
from gpt_lightning.training.verify_resume import compare_checkpoints
from helpers import SMALL_QUICKSTART, Command
from runs import BARE

EVERY_STEP = "--trainer.log_every_n_steps=1"
CSV = "metrics.csv"


def rows_of(run: str) -> list[dict[str, float]]:
    return [row for row in read_rows(Path("checkpoints", run, CSV)) if "lr" in row]


@pytest.mark.parametrize("seed", range(20))
def test_learning_rates_are_the_appendix_formula(seed: int) -> None:
    rng = random.Random(seed)
    run_steps = rng.randint(2, 300)
    warmup, peak = rng.uniform(0.0, 0.9), rng.uniform(1e-5, 1e-2)
    first, last = rng.uniform(0.0, peak), rng.uniform(0.0, peak)
    schedule = Schedule(peak, last, first, warmup, 1.0, warmup).resolve(run_steps)
    steps = int(warmup * run_steps)
    increment = (peak - first) / max(1, steps)
    for step in range(run_steps):
        if step < steps:
            expected = first + step * increment
        else:
            angle = math.pi * (step - steps) / (run_steps - steps)
            expected = last + (peak - last) * 0.5 * (1 + math.cos(angle))
        assert schedule.learning_rate(step) == pytest.approx(expected, abs=1e-12)
        assert schedule.clips(step) == (step >= steps)


SHAPES = {
    "linear": lambda p: 1 - p,
    "1-sqrt": lambda p: 1 - p**0.5,
    "cosine": lambda p: np.cos(np.pi * p / 2) ** 2,  # = (1 + cos(pi p)) / 2
}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("constant", None),
        ("cosine", None),
        ("linear", None),
        *(("wsd", shape) for shape in SHAPES),
        ("inverse_sqrt", None),
    ],
)
def test_each_schedule_is_its_formula_at_every_step_of_20_settings(
    name: str, shape: str | None
) -> None:
    rng = random.Random(f"{name} {shape}")
    for _ in range(20):
        run_steps = rng.randint(2, 300)
        warmup = rng.randint(name == "inverse_sqrt", run_steps // 2)
        end = rng.randint(warmup + 1, run_steps)  # before the end of the run, or there
        peak = rng.uniform(1e-5, 1e-2)
        first = rng.choice([None, rng.uniform(0.0, peak)])
        lowest = rng.choice([0.0, rng.uniform(0.0, peak)])
        # at most what the warmup leaves
        fraction = rng.uniform(1e-3, (end - warmup) / end) if name == "wsd" else None
        decays = name in ("cosine", "linear", "wsd")
        schedule = Schedule(
            peak, lowest, first, warmup, end if decays else None, None, name, fraction, shape
        ).resolve(run_steps)  # type: ignore[arg-type]

        if first is None:
            rising = peak * np.arange(1, warmup + 1) / max(1, warmup)
        else:
            rising = np.linspace(first, peak, warmup, endpoint=False)
        steps = np.arange(warmup, run_steps + 5, dtype=np.float64)
        if name == "constant":
            falling = np.full_like(steps, peak)
        elif name == "inverse_sqrt":  # as in "Attention is all you need", scaled to its peak
            vaswani = np.minimum(steps**-0.5, steps * warmup**-1.5)
            falling = np.maximum(lowest, peak * vaswani * warmup**0.5)
        else:
            start = warmup if fraction is None else end - math.floor(fraction * end)
            progress = np.clip((steps - start) / max(1, end - start), 0, 1)
            factor = SHAPES[shape or name](progress)
            falling = factor * peak + (1 - factor) * lowest
            falling[steps >= end] = lowest
        expected = np.concatenate([rising, falling])
        rates = [schedule.learning_rate(step) for step in range(run_steps + 5)]
        assert rates == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_what_a_schedule_leaves_out_has_defaults() -> None:
    assert Schedule(0.01) == Schedule(0.01, lr_schedule="constant")
    assert Schedule(0.01, decay_steps=9) == Schedule(0.01, decay_steps=9, lr_schedule="cosine")
    for name in ("cosine", "linear"):
        schedule = Schedule(0.01, lr_schedule=name)  # type: ignore[arg-type]
        assert schedule == Schedule(0.01, decay_steps=1.0, lr_schedule=name)  # type: ignore[arg-type]
    schedule = Schedule(0.01, lr_schedule="wsd").resolve(50)
    assert (schedule.decay_start, schedule.decay_steps, schedule.decay_type) == (40, 50, "linear")


WSD = (*BARE, EVERY_STEP, "--model.lr=0.01", "--model.warmup_steps=3", "--model.lr_schedule=wsd",
       "--model.decay_fraction=0.25", "--trainer.max_epochs=-1",
       "--model.config.drop_rate=0.1")  # fmt: skip


@pytest.mark.parametrize("decay_type", ["1-sqrt", pytest.param("linear", marks=pytest.mark.slow)])
def test_a_prolonged_wsd_run_is_the_one_that_was_that_long_from_the_start(
    fit: Command, decay_type: str
) -> None:
    settings = [*WSD, f"--model.decay_type={decay_type}"]
    fit("--run=long", *settings, "--trainer.max_steps=20")
    keep = "--checkpoint.keep_every_n_train_steps=4"
    fit("--run=r", *settings, "--trainer.max_steps=12", keep)  # it decays from step 9 on
    assert [row["lr"] for row in rows_of("r")][8:] != [row["lr"] for row in rows_of("long")][8:12]
    result = fit(
        "--run=r",
        *settings,
        "--trainer.max_steps=20",
        keep,
        "--ckpt_path=checkpoints/r/step-000008",
    )
    assert "model.decay_steps 1.0 is 20 steps (was 12)" in result.err
    assert "the decay had started" not in result.err
    files = [Path("checkpoints", run, "last.ckpt") for run in ("long", "r")]
    assert not [part for part in compare_checkpoints(*files) if part.difference]
    assert read_checkpoint(files[0])["run_steps"] == read_checkpoint(files[1])["run_steps"] == 20
    table = [
        [
            (row["step"], row["lr"], row["train/loss"], row["train/grad_norm"])
            for row in rows_of(run)
        ]
        for run in ("long", "r")
    ]
    assert table[0] == table[1]
    assert len(table[0]) == 20
    assert (
        sum(row[1] < 0.01 for row in table[0]) == 2 + 4
    )  # the warmup; after the first step of the decay


def test_a_wsd_run_that_is_prolonged_in_its_decay_says_so(fit: Command) -> None:
    fit(*WSD, "--trainer.max_steps=8")  # it decays from step 6 on
    result = fit(*WSD, "--trainer.max_steps=10", "--ckpt_path=last")
    assert (
        "the decay had started at step 6, so this is not the run that has 10 steps from the start"
        in result.err
    )


def test_without_initial_lr_the_last_step_of_the_warmup_has_lr() -> None:
    schedule = Schedule(0.01, warmup_steps=4)
    rates = [schedule.learning_rate(step) for step in range(6)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


@pytest.mark.parametrize(
    ("given", "warmup", "clip_from"),
    [((1, 2), 1, 2), ((1.0, 0.5), 54, 27), ((0.0, 0.99), 0, 53), ((0.2, 0.2), 10, 10)],
)
def test_an_int_is_a_number_of_steps_and_a_float_a_share(
    given: tuple[float, float], warmup: int, clip_from: int
) -> None:
    schedule = Schedule(0.01, warmup_steps=given[0], clip_from_step=given[1]).resolve(54)
    assert (schedule.warmup_steps, schedule.clip_from_step) == (warmup, clip_from)


def test_shares_are_those_of_the_decimal_number() -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    for hundredths in range(1, 100):
        share = hundredths / 100
        for steps in (100, 200, 1500, 2900, 10_000):
            expected = hundredths * steps // 100
            schedule = Schedule(0.01, lr_schedule="wsd", decay_fraction=share).resolve(steps)
            assert schedule.decay_start == steps - expected
            assert Schedule(0.01, warmup_steps=share).resolve(steps).warmup_steps == expected


@pytest.mark.parametrize("changed", [(13, 2, 32), (26, 1, 16), (5, 3, 64), (7, 1, 96)])
def test_a_run_that_is_resumed_with_other_batches_counts_what_is_left(
    changed: tuple[int, int, int],
) -> None:
    """Until its 10th step the run had 13 batches of 32 tokens, two a step."""
    before, now = EpochShape(13, 2, 32), EpochShape(*changed)
    done = Progress(10, before.tokens_after(10))
    trainer = SimpleNamespace(max_steps=-1, max_epochs=4)
    steps = run_steps(now, trainer, None, done)
    assert steps is not None
    left = 4 * now.tokens - done.tokens
    assert steps - 10 == pytest.approx(left / (now.accumulate * now.tokens_per_batch), abs=4)
    if changed == (13, 2, 32):
        assert steps == 4 * before.steps
        for step in range(4 * before.steps):
            same = Progress(step, before.tokens_after(step))
            assert run_steps(before, trainer, None, same) == 4 * before.steps


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ((-1, 2, None), 14),
        ((5, 2, None), 5),
        ((-1, -1, 600), 10),
        ((-1, 2, 600), 10),
        ((9, 2, 600), 9),
        ((-1, -1, None), None),
    ],
)
def test_the_first_limit_ends_the_run(
    limits: tuple[int, int, int | None], steps: int | None
) -> None:
    """13 batches of 32 tokens make 7 steps of two batches, the last one of one batch."""
    assert EpochShape(13, 2, 32).steps_of_run(*limits) == steps
    trainer = SimpleNamespace(max_steps=limits[0], max_epochs=limits[1])
    assert run_steps(EpochShape(13, 2, 32), trainer, limits[2], Progress()) == steps


@pytest.mark.parametrize(
    "limit", ["--trainer.max_steps=12", "--max_tokens=700"], ids=["max_steps", "max_tokens"]
)
def test_shares_follow_the_limit_of_the_command(fit: Command, limit: str) -> None:
    fit(
        *BARE, limit, EVERY_STEP, "--trainer.max_epochs=-1", "--model.lr=0.01",
        "--model.warmup_steps=0.5", "--model.decay_steps=1.0", "--model.initial_lr=0.001",
    )  # fmt: skip
    rates = [row["lr"] for row in rows_of("quickstart")]
    steps = len(rates)
    schedule = Schedule(0.01, 0.0, 0.001, steps // 2, steps)
    assert rates == pytest.approx([schedule.learning_rate(step) for step in range(steps)])


def test_clipping_begins_with_its_step(fit: Command) -> None:
    """The norms are taken before clipping: the first one that differs follows the first clipped step."""
    common = [*BARE, "--trainer.max_steps=6", EVERY_STEP, "--trainer.gradient_clip_val=1e-3"]
    settings = {"none": ["--trainer.gradient_clip_val=null"], "two": ["--model.clip_from_step=2"],
                "share": ["--model.clip_from_step=0.5"], "all": []}  # fmt: skip
    for run, arguments in settings.items():
        fit(f"--run={run}", *common, *arguments)
    norms = {run: [row["train/grad_norm"] for row in rows_of(run)] for run in settings}

    def first_different(run: str) -> int:
        return next(i for i in range(6) if norms[run][i] != norms["none"][i])

    assert {run: first_different(run) for run in ("all", "two", "share")} == {
        "all": 1,
        "two": 3,
        "share": 4,
    }


def test_clip_from_step_alone_is_reported(fit: Command) -> None:
    result = fit(*BARE, "--trainer.max_steps=2", "--model.clip_from_step=1")
    assert "model.clip_from_step: has no effect without trainer.gradient_clip_val" in result.err


def test_a_prolonged_run_takes_the_shares_of_its_new_length(fit: Command) -> None:
    shares = [
        *BARE, EVERY_STEP, "--model.lr=0.01", "--model.warmup_steps=0.5", "--model.decay_steps=1.0",
    ]  # fmt: skip
    fit(*shares, "--trainer.max_steps=4")
    result = fit(*shares, "--trainer.max_steps=10", "--ckpt_path=last")
    (line,) = [line for line in result.err.splitlines() if "had 4" in line]
    assert line.endswith(
        "the run has 10 steps now, and had 4; from step 4 on: model.warmup_steps 0.5 is 5 steps (was 2), "
        "model.decay_steps 1.0 is 10 steps (was 4)"
    )
    rates = [row["lr"] for row in rows_of("quickstart")]
    old, new = (
        Schedule(0.01, warmup_steps=0.5, decay_steps=1.0).resolve(steps) for steps in (4, 10)
    )
    assert rates == pytest.approx(
        [*map(old.learning_rate, range(4)), *map(new.learning_rate, range(4, 10))]
    )
    result = fit(*shares, "--trainer.max_steps=10", "--ckpt_path=last")
    assert "steps now" not in result.err


def test_shares_of_a_run_that_continues_with_a_larger_batch(fit: Command) -> None:
    shares = [
        *BARE,
        EVERY_STEP,
        "--model.lr=0.01",
        "--model.decay_steps=1.0",
        "--trainer.max_steps=-1",
    ]
    fit(*shares, "--trainer.max_epochs=1", "--data.batch_size=2")
    first = len(rows_of("quickstart"))
    result = fit(*shares, "--trainer.max_epochs=2", "--data.batch_size=7", "--ckpt_path=last")
    rates = [row["lr"] for row in rows_of("quickstart")]
    total = len(rates)
    assert total < 2 * first
    assert f"the run has {total} steps now, and had {first}" in result.err
    schedule = Schedule(0.01, decay_steps=total)
    assert rates[first:] == pytest.approx([schedule.learning_rate(i) for i in range(first, total)])


def test_fast_dev_run_ignores_the_length_of_the_run(fit: Command) -> None:
    fit("--trainer.fast_dev_run=true", "--model.clip_from_step=27", "--trainer.gradient_clip_val=1")


@pytest.mark.parametrize("rng", [pytest.param("step", marks=pytest.mark.slow), "global"])
def test_resume_in_warmup_and_decay_is_exact(runs: Runs, tmp_path: Path, rng: str) -> None:
    arguments = [
        "fit", *SMALL_QUICKSTART, "--run=r", f"--rng={rng}", "--trainer.max_steps=14", EVERY_STEP,
        "--model.lr=0.01", "--model.initial_lr=0.001", "--model.warmup_steps=5",
        "--model.decay_steps=12", "--model.min_lr=0.002", "--trainer.gradient_clip_val=0.1",
        "--model.clip_from_step=7", "--checkpoint.every_n_train_steps=3",
        "--checkpoint.save_best=false",
    ]  # fmt: skip
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    straight.mkdir()
    cut.mkdir()
    assert runs.run(straight, arguments) == 0
    stops = [
        Stop(signal.SIGKILL, "batch", 4),
        Stop(signal.SIGTERM, "batch", 6),
        Stop(signal.SIGKILL, "batch", 10),
    ]
    for stop in stops:
        code = runs.run(cut, [*arguments, "--ckpt_path=auto"], stop)
        assert code == (-signal.SIGKILL if stop.signum == signal.SIGKILL else 143)
    assert runs.run(cut, [*arguments, "--ckpt_path=auto"]) == 0
    last = "checkpoints/r/last.ckpt"
    assert not [c for c in compare_checkpoints(straight / last, cut / last) if c.difference]
    table = [
        [
            (row["lr"], row["train/loss"], row["train/grad_norm"])
            for row in read_rows(f / "checkpoints/r" / CSV)
            if "lr" in row
        ]
        for f in (straight, cut)
    ]
    assert table[0] == table[1]
    assert len(table[0]) == 14


@pytest.mark.slow
def test_verify_resume_with_shares_and_a_late_start_of_clipping(command: Command) -> None:
    """The short run has the first steps of the schedule, and clips from its first kill on at the latest."""
    result = command(
        "verify-resume", *SMALL_QUICKSTART, "--trainer.max_steps=1000",
        "--trainer.max_epochs=-1", "--model.warmup_steps=0.2",
        "--model.decay_steps=1.0", "--model.clip_from_step=0.3", "--trainer.gradient_clip_val=0.1",
        "--steps=4", "--more_steps=2", "--kills=1", "--out=kept",
    )  # fmt: skip
    assert result.code == 0, result.err
    recorded = read_checkpoint(Path("kept/cut/checkpoints/verified/last.ckpt"))["hyper_parameters"]
    assert [recorded[name] for name in ("warmup_steps", "decay_steps", "clip_from_step")] == [
        200,
        1000,
        4,
    ]


def test_plan_has_the_schedule(command: Command) -> None:
    arguments = [
        "plan", *SMALL_QUICKSTART, "--trainer.max_steps=100",
        "--trainer.max_epochs=-1", "--model.lr=0.01",
        "--model.initial_lr=0.001", "--model.warmup_steps=0.2", "--model.decay_steps=1.0",
        "--model.clip_from_step=30", "--trainer.gradient_clip_val=1",
    ]  # fmt: skip
    result = command(*arguments)
    assert result.code == 0, result.err
    line = next(line for line in result.out.splitlines() if line.startswith("learning rate"))
    assert re.sub(r"  +", " ", line) == (
        "learning rate 0.001 to 0.01 at step 20, then a cosine to 0 at step 100"
    )
    line = next(line for line in result.out.splitlines() if line.startswith("clipping"))
    assert "from step 30 on" in line
    result = command(*arguments, "--json")
    assert '"schedule": {"lr": 0.01' in result.out


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["lr_schedule=linear", "min_lr=0.001"], "then linear to 0.001 at step 100"),
        (["lr_schedule=wsd"], "then constant until step 80, then linear to 0 at step 100"),
        (
            ["lr_schedule=wsd", "decay_type=1-sqrt", "decay_fraction=0.1", "decay_steps=90"],
            "then constant until step 81, then 1-sqrt to 0 at step 90",
        ),
        (
            ["lr_schedule=inverse_sqrt", "min_lr=0.001"],
            "then it falls with the inverse square root of the step, not below 0.001",
        ),
    ],
)
def test_plan_describes_each_schedule(command: Command, settings: list[str], expected: str) -> None:
    result = command(
        "plan", *SMALL_QUICKSTART, "--trainer.max_steps=100", "--trainer.max_epochs=-1",
        "--model.lr=0.01", "--model.warmup_steps=20", *(f"--model.{s}" for s in settings),
    )  # fmt: skip
    assert result.code == 0, result.err
    line = next(line for line in result.out.splitlines() if line.startswith("learning rate"))
    assert line.endswith(f"0.0005 to 0.01 at step 19, {expected}")
