"""Classes of ``torch.optim`` as ``model.optimizer``: their state, where they do not work, other formats."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning.pretrained.source import read_weights
from gpt_lightning.training.optimizer import OptimizerConfig
from helpers import FSDP, PRETRAIN, SMALL_QUICKSTART, Command, assert_refused, plan_as_json

LAST = Path("checkpoints/quickstart/last.ckpt")


@pytest.mark.parametrize(
    ("optimizer", "arguments", "missing"),
    [("Adam", "amsgrad: true", "max_exp_avg_sq"), ("RMSprop", "momentum: 0.9", "momentum_buffer")],
)
def test_arguments_that_need_more_state_are_refused_at_a_resume(
    fit: Command, command: Command, optimizer: str, arguments: str, missing: str
) -> None:
    fit(f"--model.optimizer={optimizer}", "--trainer.max_steps=1")
    before = LAST.read_bytes()
    given = f"--model.optimizer={{class_path: {optimizer}, init_args: {{{arguments}}}}}"
    result = command("fit", *SMALL_QUICKSTART, given, "--trainer.max_steps=2", "--ckpt_path=last")
    assert_refused(result, "ckpt_path: ", missing, "init_args", "--init_from")
    assert LAST.read_bytes() == before


def test_momentum_may_begin_at_a_resume(fit: Command) -> None:
    fit("--model.optimizer=SGD", "--trainer.max_steps=1")
    fit("--model.optimizer={class_path: SGD, init_args: {momentum: 0.9}}", "--trainer.max_steps=2",
        "--ckpt_path=last")  # fmt: skip
    (state,) = torch.load(LAST, weights_only=True)["optimizer_states"]
    assert {tuple(entry) for entry in state["state"].values()} == {("momentum_buffer",)}


def test_adafactors_state_starts_a_run_and_gets_new_tokens(fit: Command, command: Command) -> None:
    """It has other entries for a matrix, of one row or one column, than for a vector."""
    adafactor = ("--model.optimizer=Adafactor", "--trainer.max_steps=1")
    fit(*adafactor)
    fit(*adafactor, "--run=two", "--init_from=checkpoints/quickstart", "--init_optimizer=true")
    (state,) = torch.load("checkpoints/two/last.ckpt", weights_only=True)["optimizer_states"]
    assert {float(entry["step"]) for entry in state["state"].values()} == {2.0}
    result = command("convert", "checkpoints/two", "more.ckpt", "--format=lightning", "--add_tokens=<one>")  # fmt: skip
    assert result.code == 0, result.err
    grown = read_weights("more.ckpt").optimizer_state
    assert grown is not None
    old, new = state["state"][0], grown["state"][0]
    assert torch.equal(new["col_var"], old["col_var"])
    assert torch.equal(new["row_var"][:50257], old["row_var"])
    torch.testing.assert_close(new["row_var"][50257:], old["row_var"].mean().expand(1, 1))
    fit(*adafactor, "--run=three", "--init_from=more.ckpt", "--init_optimizer=true")


def test_optimizer_without_state(fit: Command, command: Command) -> None:
    """SGD without momentum: there is nothing to load, and the book's format does not call it AdamW's."""
    fit("--model.optimizer=SGD", "--trainer.max_steps=1")
    result = command("fit", *SMALL_QUICKSTART, "--model.optimizer=SGD", "--run=new",
                     "--init_from=checkpoints/quickstart", "--init_optimizer=true")  # fmt: skip
    assert_refused(result, "init_optimizer: torch.optim.SGD has no state")
    assert not Path("checkpoints/new").exists()
    assert command("convert", "checkpoints/quickstart", "one.pth", "--format=book").code == 0
    assert "optimizer_state_dict" not in torch.load("one.pth", weights_only=True)


@pytest.mark.parametrize("optimizer", ["Adafactor", "torch.optim.Rprop"])
@pytest.mark.parametrize("name", ["fit", "plan"])
def test_classes_that_cannot_be_sharded(command: Command, name: str, optimizer: str) -> None:
    result = command(name, *SMALL_QUICKSTART, *FSDP, f"--model.optimizer={optimizer}")
    assert_refused(result, "model.optimizer: ", "FSDP2")
    assert not Path("checkpoints").exists()


def test_every_other_class_can_be_chosen() -> None:
    refused = {"LBFGS", "Muon", "Optimizer", "SparseAdam"}
    classes = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    for name in classes - refused:
        assert OptimizerConfig(optimizer=name).name == f"torch.optim.{name}"


def test_plan_does_not_propose_shards_to_a_class_that_has_none(command: Command) -> None:
    """Where only FSDP2 is enough: AdamW gets it, Adafactor gets no proposal."""

    def planned(optimizer: str, gigabytes: float) -> dict[str, Any]:
        return plan_as_json(
            command, f"--config={PRETRAIN}", "--gpu=H100", "--devices=8",
            f"--model.optimizer={optimizer}", f"--device_memory_gb={gigabytes}",
        )  # fmt: skip

    least = planned("adamw", 0.001)["least"] / 1e9
    assert "configs/fsdp.yaml" in str(planned("adamw", 1.01 * least)["nearest"])
    assert planned("Adafactor", 1.01 * least)["nearest"] is None
