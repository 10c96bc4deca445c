"""The plan of a run: documented tables, steps and tokens as fit counts them, proposed changes."""

import json
import sys
from math import ceil
from pathlib import Path
from types import ModuleType

import pytest

from gpt_lightning import GPTConfig
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.planning.plan import RunSpec, plan
from gpt_lightning.planning.step_parts import StepShape
from gpt_lightning.pretrained.weights import read_checkpoint
from helpers import PRETRAIN, QUICKSTART, ROOT, SMALL, SMALL_QUICKSTART, Command, plan_as_json

DOC = ROOT / "docs" / "planning.md"


def documented(plan_benchmark: ModuleType) -> list[str]:
    lines = DOC.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| size | devices"))
    return lines[start : start + 2 + 5 * len(GPT2_SIZES)]


def test_documented_table_equals_what_plan_computes(plan_benchmark: ModuleType) -> None:
    assert plan_benchmark.table().splitlines() == documented(plan_benchmark)


def gpu_rows() -> dict[str, list[str]]:
    lines = DOC.read_text(encoding="utf-8").split("### On a GPU")[1].splitlines()
    table = [line.strip("|").split("|") for line in lines if line.startswith("|")][2:]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in table}


def test_documented_gpu_runs_equal_the_recorded_ones(plan_benchmark: ModuleType) -> None:
    results = {
        commit: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
        for commit, name in (("70d1f70", "h200-plan-70d1f70"), ("c42e126", "h200-plan"))
    }
    rows = gpu_rows()
    assert list(rows) == list(plan_benchmark.GPU_RUNS)
    for name, (counted, measured, off, commit, _) in rows.items():
        found = results[commit]["runs"][name]
        assert counted == f"{found['counted'] / 1e9:.2f} GB"
        assert measured == f"{found['measured'] / 1e9:.2f} GB"
        assert off == f"{100 * found['off']:+.1f} %".replace("-", "−")
        assert found["off"] == pytest.approx(found["counted"] / found["measured"] - 1, abs=2e-3)
        assert abs(found["off"]) <= plan_benchmark.TOLERANCE_ON_GPU


@pytest.mark.parametrize("run", range(5))
def test_predicted_memory_is_within_a_tenth_of_recorded_gpu_runs(
    plan_benchmark: ModuleType, command: Command, run: int
) -> None:
    name, settings = list(plan_benchmark.GPU_RUNS.items())[run]
    total = plan_as_json(command, *plan_benchmark.ON_GPU, *settings, "--gpu=H100")["total"]
    _, measured, _, _, shown = gpu_rows()[name]
    assert shown == f"{total / 1e9:.2f} GB"
    assert total == pytest.approx(
        1e9 * float(measured.split()[0]), rel=plan_benchmark.TOLERANCE_ON_GPU
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("run", [pytest.param(0, marks=pytest.mark.nightly), pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.nightly)])  # fmt: skip
def test_memory_of_a_run_is_the_predicted_one(plan_benchmark: ModuleType, run: int) -> None:
    """Within 20 % of the median peak resident set of three runs of ``fit`` with the same settings."""
    settings = list(plan_benchmark.RUNS.values())[run]
    result = plan_benchmark.compare([*plan_benchmark.COMMON, *settings])
    assert abs(result["off"]) <= plan_benchmark.TOLERANCE, result


def test_plan_counts_the_steps_of_an_epoch_as_fit_does(command: Command) -> None:
    settings = [*SMALL_QUICKSTART, "--trainer.max_epochs=2", "--data.batch_size=3"]
    found = plan_as_json(command, *settings)
    assert command("fit", *settings).code == 0
    assert (
        found["steps"] == read_checkpoint(Path("checkpoints/quickstart/last.ckpt"))["global_step"]
    )


@pytest.mark.parametrize(
    "settings",
    [
        ["--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=3"],  # an epoch has 7 batches
        ["--trainer.max_steps=4", "--trainer.accumulate_grad_batches=3"],
        ["--trainer.max_epochs=3", "--trainer.limit_train_batches=2"],
        ["--trainer.max_epochs=3", "--trainer.limit_train_batches=0.5"],
        ["--trainer.max_epochs=3", "--trainer.overfit_batches=2"],
        ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--data.global_batch_size=4"],
        ["--trainer.max_epochs=2", "--data.global_batch_size=6"],
        ["--trainer.max_epochs=null", "--max_tokens=500", "--trainer.accumulate_grad_batches=3"],
        ["--trainer.max_epochs=2", "--max_tokens=150", "--trainer.limit_train_batches=3"],
    ],
    ids=" ".join,
)
def test_plan_counts_steps_and_tokens_as_fit_does(command: Command, settings: list[str]) -> None:
    settings = [*SMALL_QUICKSTART, "--data.num_workers=0", *settings]
    found = plan_as_json(command, *settings)
    result = command("fit", *settings, "--evaluation.prompt=null")
    assert result.code == 0, result.err
    last = read_checkpoint(Path("checkpoints/quickstart/last.ckpt"))
    assert (found["steps"], found["tokens"]) == (last["global_step"], last["tokens_seen"])
    assert f"step 0 of {found['steps']} ({found['epochs']:.3g} epochs)" in result.err


SMALL_CONFIG = GPTConfig(
    vocab_size=5000, context_length=16, emb_dim=32, n_heads=2, n_layers=3, drop_rate=0.0
)


def test_time_is_divided_by_devices_and_fit_is_unknown_without_a_memory_size() -> None:
    step = StepShape(SMALL_CONFIG, 2, 16, device="cuda")
    one = plan(RunSpec(step), tokens=10_000, peak_flops=1e12, mfu=0.5)
    eight = plan(RunSpec(step, devices=8, strategy="ddp"), tokens=10_000, peak_flops=1e12, mfu=0.5)
    assert one.hours is not None
    assert eight.hours == pytest.approx(one.hours / 8)
    assert (one.steps, eight.steps) == (ceil(10_000 / 32), ceil(10_000 / 256))
    assert one.fits is None
    assert eight.total - one.total == one.memory["weights"]  # DDP's buckets


@pytest.mark.parametrize(
    "options", [(), ("--model.ema_decay=0.9", "--trainer.precision=bf16-true")]
)
def test_checkpoint_has_the_predicted_size(
    command: Command, fit: Command, options: tuple[str, ...]
) -> None:
    arguments = ("--trainer.max_steps=2", "--trainer.max_epochs=-1", "--model.config.emb_dim=16",
                 *options)  # fmt: skip
    found = plan_as_json(command, *SMALL_QUICKSTART, *arguments)
    fit("--run=sized", *arguments)
    folder = Path("checkpoints/sized")
    assert (folder / "last.ckpt").stat().st_size == pytest.approx(found["checkpoint"], rel=0.01)
    files = sum(path.stat().st_size for path in folder.glob("*.ckpt"))
    assert files <= found["disk"]


LONG = ["--model.config.context_length=512", "--model.config.emb_dim=256", "--model.config.n_layers=2",
        "--data.batch_size=16", "--trainer.accumulate_grad_batches=2"]  # fmt: skip


WIDE = ["--model.config.emb_dim=256", "--model.config.n_layers=2", "--data.batch_size=1"]


@pytest.mark.parametrize(
    ("settings", "memory_gb", "named"),
    [
        (LONG, 1.6, "--data.batch_size 2 --trainer.accumulate_grad_batches 16"),
        (WIDE, 0.3, "--config configs/fsdp.yaml --trainer.precision 32-true"),
    ],
)
def test_run_that_does_not_fit_fits_with_the_proposed_changes(
    command: Command, settings: list[str], memory_gb: float, named: str
) -> None:
    arguments = [
        QUICKSTART, *settings, f"--device_memory_gb={memory_gb}", "--gpu=H100", "--devices=8",
    ]  # fmt: skip
    found = plan_as_json(command, *arguments)
    assert found["fits"] is False
    assert found["total"] > memory_gb * 1e9
    options = " ".join(found["nearest"]["options"])
    assert options == named
    assert options in command("plan", *arguments).out
    fsdp = "trainer: {strategy: {class_path: lightning.pytorch.strategies.ModelParallelStrategy}}"
    Path("fsdp.yaml").write_text(fsdp, encoding="utf-8")
    words = options.replace("configs/fsdp.yaml", "fsdp.yaml").split()
    again = plan_as_json(command, *arguments, *words)
    assert again["fits"] is True
    assert again["total"] == found["nearest"]["total"]
    assert again["tokens_per_step"] == found["tokens_per_step"]


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_fsdp_is_not_proposed_with_a_precision_that_fit_refuses(
    command: Command, precision: str
) -> None:
    arguments = [QUICKSTART, *WIDE, f"--trainer.precision={precision}", "--gpu=T4", "--devices=8"]
    found = plan_as_json(command, *arguments, "--device_memory_gb=0.3")
    assert found["fits"] is False
    assert found["nearest"] is None or "configs/fsdp.yaml" not in str(found["nearest"]["options"])
    assert "FSDP2" not in command("plan", *arguments, "--device_memory_gb=0.3").out


FSDP_CONFIG = f"--config={ROOT}/configs/fsdp.yaml"


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_plan_refuses_fsdp_with_a_precision_that_fit_refuses(
    command: Command, precision: str
) -> None:
    settings = [QUICKSTART, FSDP_CONFIG, *SMALL, f"--trainer.precision={precision}"]
    result, fits = command("plan", *settings, "--devices=2"), command("fit", *settings)
    assert (result.code, result.out) == (2, "")
    assert result.error == fits.error


def test_run_that_cannot_fit_is_reported_with_its_least_memory(command: Command) -> None:
    arguments = (
        QUICKSTART, "--gpu=T4", "--device_memory_gb=0.01", "--data.batch_size=8",
        "--model.activation_checkpointing=true",
    )  # fmt: skip
    found = plan_as_json(command, *arguments)
    assert (found["fits"], found["nearest"]) == (False, None)
    assert 0.01e9 < found["least"] < found["total"]
    assert "nor with all changes that plan knows" in command("plan", *arguments).out


def test_gpu_without_our_kernels_needs_more_memory(command: Command) -> None:
    """It holds the logits of a chunk also in float32."""
    old, new = (
        plan_as_json(
            command, f"--config={PRETRAIN}", f"--gpu={gpu}", "--trainer.precision=bf16-mixed"
        )
        for gpu in ("V100", "A100")
    )
    chunk = 8192 * 50304
    assert 2 * chunk < old["total"] - new["total"] < 10 * chunk


def test_overlay_for_16_gb(command: Command) -> None:
    """It needs the memory that its header names, at the same global batch, and no bfloat16."""
    overlay = ROOT / "configs" / "16gb.yaml"
    alone, both = (
        plan_as_json(command, f"--config={PRETRAIN}", *more, "--gpu=T4")
        for more in ([], [f"--config={overlay}"])
    )
    assert both["fits"] is True
    assert both["device_memory"] == 16e9
    assert both["total"] < alone["total"] / 2
    assert both["tokens_per_step"] == alone["tokens_per_step"] == 524_288
    assert both["settings"]["step"]["precision"] == "16-mixed"
    header = overlay.read_text(encoding="utf-8")
    assert f"estimates {both['total'] / 1e9:.1f} GB: 128 micro-batches of 4 windows" in header
    assert both["settings"]["micro_batches"] == 128
    assert f"estimates {both['hours']:.0f} hours on a T4" in header


def test_plan_knows_that_a_t4_has_no_bfloat16(command: Command) -> None:
    arguments = [QUICKSTART, *WIDE, "--gpu=T4"]
    found = plan_as_json(command, *arguments, "--trainer.precision=bf16-mixed")
    assert found["notes"]["precision"].startswith("T4 has no bfloat16")
    assert found["hours"] is None
    half = plan_as_json(command, *arguments, "--trainer.precision=16-mixed")
    assert "precision" not in half["notes"]
    assert half["hours"] is not None
    for percent in (95, 80, 60, 40):
        limit = half["total"] / 1e9 * percent / 100
        full = plan_as_json(command, *arguments, f"--device_memory_gb={limit}")
        assert "bf16" not in str(full["nearest"])
