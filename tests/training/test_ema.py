"""The moving average of the weights: its values, its evaluation, and that it leaves the run as it is."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback

from gpt_lightning import GPTLightningModule, load_model
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.ema import decay_at
from helpers import SMALL_QUICKSTART, TINY_MODEL, Command, assert_refused, json_of
from runs import LAST, RUN, assert_same_bits, read_metrics, same_bits, same_runs

EMA = "--model.ema_decay=0.8"


class WeightsOfEachStep(Callback):
    """Callback that copies the weights before the first step and after each one, and spoils chosen steps."""

    copies: ClassVar[list[dict[str, torch.Tensor]]] = []
    spoiled: ClassVar[set[int]] = set()
    steps = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._copy(module)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if trainer.global_step in self.spoiled:
            next(module.parameters()).grad.fill_(math.nan)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            self._copy(module)

    def _copy(self, module: Any) -> None:
        self.copies.append({name: p.detach().clone() for name, p in module.named_parameters()})


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[WeightsOfEachStep]:
    monkeypatch.setattr(WeightsOfEachStep, "copies", [])
    monkeypatch.setattr(WeightsOfEachStep, "spoiled", set())
    return WeightsOfEachStep


RECORD = (f"--allow_import={__name__}", f"--trainer.callbacks+={__name__}.WeightsOfEachStep")


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("64-true", 1e-14), ("32-true", 1e-6), ("bf16-true", 1e-6)]
)
def test_average_is_the_one_of_a_plain_loop(
    fit: Command, recorded: type[WeightsOfEachStep], precision: str, tolerance: float
) -> None:
    """With accumulated micro-batches, and a skipped step, which counts with unchanged weights."""
    recorded.spoiled.add(5)
    fit(EMA, *RECORD, *TINY_MODEL, f"--trainer.precision={precision}", "--bad_steps=skip",
        "--trainer.accumulate_grad_batches=3", "--trainer.max_steps=40", "--trainer.max_epochs=-1")  # fmt: skip
    first, *steps = ({n: w.double() for n, w in copy.items()} for copy in recorded.copies)
    assert len(steps) == 40
    assert same_bits(steps[4], steps[5])
    average = first
    for t, weights in enumerate(steps):
        d = min(0.8, (1 + t) / (10 + t))
        average = {name: d * average[name] + (1 - d) * w for name, w in weights.items()}
    checkpoint = read_checkpoint(LAST)
    saved = checkpoint["state_dict_ema"]
    assert list(saved) == list(checkpoint["state_dict"])
    assert {t.dtype for t in saved.values()} == {
        torch.float64 if precision == "64-true" else torch.float32
    }
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor.double(), average[name], rtol=tolerance, atol=tolerance)
    assert not same_bits(saved, checkpoint["state_dict"])


def test_decay_rises_to_the_given_one() -> None:
    decays = [decay_at(update, 0.999) for update in range(20_000)]
    assert decays[0] == 0.1  # almost only the weights of the first step
    assert decays == sorted(decays)
    assert decays[-1] == 0.999
    assert decay_at(0, 0.0) == 0.0


@pytest.mark.parametrize("rng", ["step", "global"])
def test_run_has_the_same_bits_with_and_without(fit: Command, rng: str) -> None:
    arguments = (f"--rng={rng}", "--model.config.drop_rate=0.1", "--evaluation.eval_freq=1",
                 "--trainer.max_steps=10")  # fmt: skip
    fit("--run=without", *arguments)
    fit("--run=with", EMA, *arguments)
    assert same_runs("without", "with")
    without, averaged = (read_metrics(Path("checkpoints", name)) for name in ("without", "with"))
    for row in (*without, *averaged):
        row.pop("tokens_per_second", None)
    ema = [row.pop("val_loss_ema") for row in averaged if "val_loss" in row]
    assert averaged == without
    assert len(set(ema)) == 10


def test_resumed_run_has_the_bits_of_an_uninterrupted_one(fit: Command) -> None:
    """Stopped within an epoch and at its end; ``assert_same_bits`` compares the average too."""
    common = (EMA, *TINY_MODEL, "--model.config.drop_rate=0.1", "--evaluation.eval_freq=3")
    fit("--run=straight", *common, "--trainer.max_steps=17")
    fit("--run=cut", *common, "--trainer.max_steps=5")
    fit("--run=cut", *common, "--trainer.max_steps=14", "--ckpt_path=last")
    fit("--run=cut", *common, "--trainer.max_steps=17", "--ckpt_path=last")
    straight, cut = (Path("checkpoints", run) for run in ("straight", "cut"))
    assert_same_bits(straight / "last.ckpt", cut / "last.ckpt")
    assert [
        [row["val_loss_ema"] for row in read_metrics(run) if "val_loss" in row]
        for run in (straight, cut)
    ] == [[pytest.approx(10.8, abs=0.5)] * 6] * 2
    changed = read_checkpoint(cut / "last.ckpt")
    next(iter(changed["state_dict_ema"].values()))[0] += 1e-6
    torch.save(changed, "changed.ckpt")
    with pytest.raises(AssertionError):  # the comparison sees the average
        assert_same_bits(straight / "last.ckpt", Path("changed.ckpt"))


@pytest.mark.slow
def test_killed_run_has_the_bits_of_an_uninterrupted_one(command: Command) -> None:
    result = command("verify-resume", *SMALL_QUICKSTART, *TINY_MODEL, EMA,
                     "--steps=5", "--more_steps=4", "--kills=1")  # fmt: skip
    assert result.code == 0, result.out + result.err


def test_average_can_be_switched_on_and_off_at_a_resume(
    fit: Command, recorded: type[WeightsOfEachStep]
) -> None:
    fit("--trainer.max_steps=4", *TINY_MODEL)
    assert "state_dict_ema" not in read_checkpoint(LAST)
    on = fit("--trainer.max_steps=5", *TINY_MODEL, "--ckpt_path=last", EMA, *RECORD)
    assert (
        "model.ema_decay: the checkpoint has no average of the weights, so it starts from the "
        "weights after 4 steps\n"
    ) in on.err
    before, after = recorded.copies
    saved = read_checkpoint(LAST)
    assert saved["ema_updates"] == 1
    for name, tensor in saved["state_dict_ema"].items():
        torch.testing.assert_close(tensor, 0.1 * before[name] + 0.9 * after[name])
    other = fit("--trainer.max_steps=6", *TINY_MODEL, "--ckpt_path=last", "--model.ema_decay=0.05")
    assert "ema_decay" not in other.err
    checkpoint = read_checkpoint(LAST)
    assert checkpoint["ema_updates"] == 2
    for name, tensor in checkpoint["state_dict_ema"].items():
        expected = 0.05 * saved["state_dict_ema"][name] + 0.95 * checkpoint["state_dict"][name]
        torch.testing.assert_close(tensor, expected)
    off = fit("--trainer.max_steps=7", *TINY_MODEL, "--ckpt_path=last")
    assert (
        "model.ema_decay: is not given, so the checkpoint's average of the weights is dropped\n"
        in off.err
    )
    assert "state_dict_ema" not in read_checkpoint(LAST)
    assert "val_loss_ema" not in read_metrics(RUN)[-1]


@pytest.mark.parametrize("decay", ["1", "-0.1", "1.5", "nan", "inf"])
def test_decay_out_of_range_is_refused(command: Command, decay: str) -> None:
    result = command("fit", *SMALL_QUICKSTART, f"--model.ema_decay={decay}")
    assert_refused(result, f"model.ema_decay: {float(decay)} is not ", "give ")
    assert not RUN.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c["state_dict_ema"].popitem(),
        lambda c: c["state_dict_ema"].update({"model.final_norm.shift": torch.ones(3)}),
        lambda c: c["state_dict_ema"].update({"model.final_norm.shift": 3}),
        lambda c: c.update(state_dict_ema=None),
        lambda c: c.pop("ema_updates"),
        lambda c: c.update(ema_updates=True),
        lambda c: c.update(ema_updates=-1),
    ],
)
def test_damaged_average_is_refused(
    fit: Command, command: Command, damage: Callable[[Any], None]
) -> None:
    fit(EMA, *TINY_MODEL, "--trainer.max_steps=1")
    checkpoint = read_checkpoint(LAST)
    damage(checkpoint)
    torch.save(checkpoint, "x.ckpt")
    result = command("fit", *SMALL_QUICKSTART, *TINY_MODEL, EMA, "--run=y", "--ckpt_path=x.ckpt")
    assert_refused(result, "x.ckpt", "state_dict_ema" if "ema_updates" in checkpoint else "")


# --- evaluation -----------------------------------------------------------------------------------


def test_loss_of_the_average_is_the_one_that_validate_computes(
    fit: Command, command: Command
) -> None:
    """In the printed line, ``metrics.csv`` and the summary, and as TensorBoard's line ``val_ema``."""
    result = fit(EMA, "--trainer.max_steps=11", "--evaluation.eval_iter=null",
                 "--evaluation.eval_freq=10", "--model.lr=0.01")  # fmt: skip
    row = [row for row in read_metrics(RUN) if "val_loss" in row][-1]
    loss = row["val_loss_ema"]
    assert abs(loss - row["val_loss"]) > 1e-3
    line = f"Val loss {row['val_loss']:.3f}, EMA val loss {loss:.3f}\n"
    assert result.out.count(line) == 1
    assert f"val_loss {row['val_loss']:.3f}, val_loss_ema {loss:.3f}\n" in result.err
    assert command("convert", str(RUN), "average.ckpt", "--ema").code == 0
    validated = json_of(
        command("validate", *SMALL_QUICKSTART, "--init_from=average.ckpt", "--json")
    )
    assert validated["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert list(RUN.glob("val_ema/events.out.*"))


def test_best_checkpoint_is_chosen_by_the_loss_of_the_weights(fit: Command) -> None:
    """The average is slow and its loss falls until the end; with this rate the weights' loss rises."""
    fit("--model.ema_decay=0.99", "--trainer.max_steps=60", "--trainer.max_epochs=-1",
        "--evaluation.eval_freq=2", "--model.lr=0.03", "--model.warmup_steps=0")  # fmt: skip
    rows = [row for row in read_metrics(RUN) if "val_loss" in row]
    lowest, averaged = (min(rows, key=lambda row: row[k]) for k in ("val_loss", "val_loss_ema"))
    assert lowest["step"] != averaged["step"]
    assert read_checkpoint(RUN / "best.ckpt")["global_step"] == lowest["step"] + 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_weights_and_average_keep_their_bits_when_they_are_evaluated(
    fit: Command, precision: str
) -> None:
    common = (EMA, *TINY_MODEL, f"--trainer.precision={precision}", "--trainer.max_steps=6")
    fit("--run=often", "--evaluation.eval_freq=1", *common)
    fit("--run=never", "--evaluation.eval_freq=1000", *common)
    often, never = (
        read_checkpoint(Path("checkpoints", r, "last.ckpt")) for r in ("often", "never")
    )
    for key in ("state_dict", "state_dict_ema", "optimizer_states"):
        assert same_bits(often[key], never[key]), key


# --- export ---------------------------------------------------------------------------------------


def test_average_is_exported_by_convert_and_load_model(fit: Command, command: Command) -> None:
    common = (EMA, "--trainer.max_steps=5", "--model.config.qkv_bias=true")
    fit(*common, "--run=one")
    fit(*common, "--run=two", "--seed_everything=7")
    first, second = (
        read_checkpoint(Path("checkpoints", run, "last.ckpt"))["state_dict_ema"]
        for run in ("one", "two")
    )
    for dest, options in (("a.ckpt", ()), ("a.pth", ()), ("a", ("--format=hf",))):
        result = command("convert", "checkpoints/one", dest, "--ema", *options)
        assert result.code == 0, result.err
        for name, tensor in load_model(dest, **_heads(dest)).state_dict().items():
            assert torch.equal(tensor, first[f"model.{name}"]), (dest, name)
    assert "optimizer_states" not in read_checkpoint(Path("a.ckpt"))
    for name, tensor in load_model("checkpoints/one", ema=True).state_dict().items():
        assert torch.equal(tensor, first[f"model.{name}"])
    raw = read_checkpoint(Path("checkpoints/one/last.ckpt"))["state_dict"]
    for name, tensor in load_model("checkpoints/one").state_dict().items():
        assert torch.equal(tensor, raw[f"model.{name}"])
    both = command(
        "convert", "checkpoints/one", "checkpoints/two", "mean.ckpt", "--ema", "--average"
    )
    assert both.code == 0, both.err
    for name, tensor in load_model("mean.ckpt").state_dict().items():
        mean = (first[f"model.{name}"].double() + second[f"model.{name}"]) / 2
        assert torch.equal(tensor, mean.float())


def test_module_is_loaded_without_its_average(fit: Command) -> None:
    """By Lightning's own method, where the module has no trainer."""
    fit(EMA, *TINY_MODEL, "--trainer.max_steps=1")
    module = GPTLightningModule.load_from_checkpoint(LAST, ema_decay=None)
    assert module.ema_decay is None
    assert same_bits(dict(module.state_dict()), dict(read_checkpoint(LAST)["state_dict"]))


def _heads(dest: str) -> dict[str, int]:
    return {"n_heads": 2} if dest.endswith(".pth") else {}


def test_convert_refuses_a_source_without_an_average(
    command: Command, trained_run: Path, gpt2: Any
) -> None:
    for source in (str(trained_run), "gpt2"):
        result = command("convert", source, "x.ckpt", "--ema")
        assert_refused(result, f"ema: {source} has no moving average of its weights")
        assert not Path("x.ckpt").exists()
        with pytest.raises(ValueError, match=re.escape(source)):
            load_model(source, ema=True)
