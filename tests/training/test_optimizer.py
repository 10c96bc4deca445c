"""The optimizer: schedule, weight decay, clipping, the norm of gradients."""

import math
from pathlib import Path

import pytest
import torch

from gpt_lightning.training.grad_norm import global_grad_norm, norm_is_certainly_finite
from gpt_lightning.training.run_files import read_rows
from helpers import Command
from runs import same_checkpoints


@pytest.mark.parametrize("decay_matrices_only", ["true", "false"])
def test_learning_rate_schedule_and_weight_decay(fit: Command, decay_matrices_only: str) -> None:
    fit(
        "--trainer.max_steps=6", "--trainer.log_every_n_steps=1", "--model.lr=0.01",
        f"--model.decay_matrices_only={decay_matrices_only}",
        "--model.warmup_steps=2", "--model.decay_steps=4", "--model.min_lr=0.001",
    )  # fmt: skip
    rows = read_rows(Path("checkpoints/quickstart/metrics.csv"))
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0055, 0.001, 0.001])
    groups = torch.load("checkpoints/quickstart/last.ckpt", weights_only=True)["optimizer_states"][
        0
    ]
    decays = [group["weight_decay"] for group in groups["param_groups"]]
    assert decays == ([0.1, 0.0] if decay_matrices_only == "true" else [0.1])
    if decay_matrices_only == "true":
        names = groups["param_groups"][1]["param_names"]
        assert all("norm" in name or name.endswith("bias") for name in names)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_in_mixed_precision(fit: Command, algorithm: str) -> None:
    fit(
        "--trainer.max_steps=2", "--trainer.precision=bf16-mixed", "--trainer.log_every_n_steps=1",
        "--trainer.gradient_clip_val=1e-6", f"--trainer.gradient_clip_algorithm={algorithm}",
    )  # fmt: skip
    checkpoint = torch.load("checkpoints/quickstart/last.ckpt", weights_only=True)
    moments = [state["exp_avg"] for state in checkpoint["optimizer_states"][0]["state"].values()]
    assert 0 < max(moment.abs().max() for moment in moments) <= 1e-6
    rows = read_rows(Path("checkpoints/quickstart/metrics.csv"))
    assert all(row["train/grad_norm"] > 1e-3 for row in rows if "lr" in row)  # before clipping


def test_clip_value_0_clips_nothing(fit: Command) -> None:
    """As in Lightning: a factor of 0 would stop the training."""
    plain, clipped = (
        fit(f"--run={run}", "--trainer.max_steps=3", *arguments).out
        for run, arguments in [("plain", []), ("clipped", ["--trainer.gradient_clip_val=0"])]
    )
    assert plain == clipped
    assert same_checkpoints("plain", "clipped")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e16, 1e14, 0.0])
def test_quick_check_misses_no_bad_gradient(value: float) -> None:
    """At any position; if the square of a finite gradient overflows float32, the norm decides."""
    for place in (0, 1500, 4999):
        gradients = [torch.ones(3), torch.ones(50, 100)]
        gradients[1].view(-1)[place] = value
        surely = norm_is_certainly_finite(gradients)
        assert surely == (abs(value) < 1e15)
        assert global_grad_norm(gradients).isfinite() or not surely


def test_norm_does_not_depend_on_how_gradients_are_sharded() -> None:
    """Gradients are as large and as uneven as those of the embedding of the 124M model."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(30_000, 300, generator=generator) * 1e-4
    large[torch.rand(30_000, generator=generator) < 0.9] *= 0.01
    small = torch.randn(300, generator=generator) * 1e-3
    exact = math.sqrt(float(large.double().square().sum() + small.double().square().sum()))
    assert float(global_grad_norm([large, small])) == pytest.approx(exact, rel=1e-6)
    shares = [
        float(global_grad_norm([a, b])) for a, b in zip(large.chunk(2), small.chunk(2), strict=True)
    ]
    assert math.hypot(*shares) == pytest.approx(exact, rel=1e-6)
    assert float(global_grad_norm([])) == 0.0
