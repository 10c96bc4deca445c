"""Apple's GPUs, by a stand-in: no float64 tensor reaches the device, and dropout's random numbers are resumed.

``mps_stand_in.py`` says what the stand-in does, and what it cannot show.
"""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from gpt_lightning import load_model
from gpt_lightning.cli.generate import resolve_device
from gpt_lightning.generation.sampling import entropy, top_p_filter
from gpt_lightning.model import precision
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.metrics import TokenWeightedLoss
from gpt_lightning.training.rng import get_rng_state, seed_micro_batch, set_rng_state
from helpers import (
    ENVIRONMENT,
    ROOT,
    SMALL_QUICKSTART,
    Command,
    CommandResult,
    assert_refused,
    python,
)
from runs import read_metrics, same_checkpoints

FIT = ["fit", *SMALL_QUICKSTART, "--model.config.drop_rate=0.2", "--evaluation.eval_freq=1",
       "--evaluation.log_next_token=true", "--trainer.log_every_n_steps=1"]  # fmt: skip
OTHER_SETTINGS = [
    "--trainer.max_steps=3", "--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=0.5",
    "--model.loss_chunk_size=8", "--model.activation_checkpointing=true", "--data.document_mask=true",
    "--skip_spikes=true", "--throughput.every_n_steps=2",
]  # fmt: skip
FROM = ("--from=checkpoints/step", "--prompt=The clock")
# commands whose results must be those of the CPU
COMPARED = [
    ["generate", *FROM, "--prompt=A", "--temperature=1", "--top_k=500", "--top_p=0.9", "--min_p=1e-5",
     "--repetition_penalty=1.1", "--num_samples=2", "--max_new_tokens=30"],
    ["generate", *FROM, "--max_new_tokens=30"],
    ["report", "sampling", *FROM, "--top_p=[0.9,1]", "--num_samples=50"],
    ["report", "sweep", *FROM, "--temperatures=[0,1]", "--top_k=[1,0]", "--top_p=[0.9]", "--num_samples=2",
     "--max_new_tokens=5"],
    ["report", "sizes", *FROM, "--text=sample", "--max_new_tokens=3"],
]  # fmt: skip
# measurements of time and memory
_MEASURED = ("seconds_to_load", "seconds_to_first_token", "tokens_per_second", "peak_memory_bytes", "methods",
             "device")  # fmt: skip


def run_on_stand_in(folder: Path, *commands: list[str]) -> list[CommandResult]:
    result = python(
        str(ROOT / "tests" / "mps_stand_in.py"), json.dumps(commands), cwd=folder, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stderr
    results = [CommandResult(*entry) for entry in json.loads(result.stdout)]
    for answer in results:
        assert answer.code == 0, answer.err
    return results


def unmeasured(value: Any) -> Any:
    """``value`` without times and memory, with numbers rounded to 5 digits."""
    if isinstance(value, dict):
        return {key: unmeasured(v) for key, v in value.items() if key not in _MEASURED}
    if isinstance(value, list):
        return [unmeasured(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


@pytest.mark.slow
def test_commands_on_a_device_without_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    validate = ["validate", *SMALL_QUICKSTART, "--init_from=checkpoints/step", "--json"]
    results = run_on_stand_in(
        tmp_path,
        [*FIT, "--trainer.accelerator=mps", "--run=step", "--trainer.max_steps=3"],
        [*FIT, "--trainer.accelerator=cpu", "--run=cpu", "--trainer.max_steps=3"],
        [*FIT, "--trainer.accelerator=mps", "--run=other", *OTHER_SETTINGS],
        [*validate, "--trainer.accelerator=mps"],
        [*validate, "--trainer.accelerator=cpu"],
        *([*command, "--json", f"--device={name}"] for command in COMPARED for name in ("stand_in", "cpu")),
    )  # fmt: skip
    assert "parameters on stand_in:0" in results[0].err
    for row, expected in zip(*(read_metrics(Path("checkpoints") / run) for run in ("step", "cpu")), strict=True):  # fmt: skip
        assert row.keys() == expected.keys()
        for name in row.keys() - {"tokens_per_second"}:
            # global_grad_norm sums in blocks on a CPU, and with torch's kernel on other devices
            rel = 1e-4 if name == "train/grad_norm" else 1e-5
            assert row[name] == pytest.approx(expected[name], rel=rel), name
    answers = [json.loads(result.out) for result in results[3:]]
    for on_device, on_cpu in zip(answers[::2], answers[1::2], strict=True):
        assert unmeasured(on_device) == unmeasured(on_cpu)


@pytest.mark.slow
def test_resume_with_the_device_s_random_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed part runs in another process, whose generator starts with another state."""
    monkeypatch.chdir(tmp_path)
    fit = [*FIT, "--trainer.accelerator=mps"]
    run_on_stand_in(
        tmp_path,
        *([*fit, f"--rng={rng}", f"--run={rng}", "--trainer.max_steps=5"] for rng in ("step", "global")),
        *([*fit, f"--rng={rng}", f"--run={rng}_cut", "--trainer.max_steps=2"] for rng in ("step", "global")),
    )  # fmt: skip
    run_on_stand_in(
        tmp_path,
        *([*fit, f"--rng={rng}", f"--run={rng}_cut", "--trainer.max_steps=5", "--ckpt_path=last"]
          for rng in ("step", "global")),
    )  # fmt: skip
    for rng in ("step", "global"):
        assert same_checkpoints(rng, f"{rng}_cut")
    saved = read_checkpoint(Path("checkpoints/global/last.ckpt"))["random_numbers"]
    assert saved.keys() == {"cpu", "mps"}


@pytest.fixture
def mps_generator(monkeypatch: pytest.MonkeyPatch) -> torch.Generator:
    """A generator that torch takes for that of MPS."""
    generator = torch.Generator()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "_get_default_mps_generator", lambda: generator)
    monkeypatch.setattr(torch._C, "_has_mps", True)
    return generator


def test_generator_of_mps_is_seeded_and_restored(mps_generator: torch.Generator) -> None:
    seed_micro_batch(1, 2, 3, 0)
    drawn = torch.rand(3, generator=mps_generator)
    state = get_rng_state()
    after = torch.rand(3, generator=mps_generator)
    assert not torch.equal(drawn, after)
    mps_generator.seed()
    set_rng_state(state)
    assert torch.equal(after, torch.rand(3, generator=mps_generator))
    mps_generator.seed()
    seed_micro_batch(1, 2, 3, 0)
    assert torch.equal(drawn, torch.rand(3, generator=mps_generator))


def test_sums_and_filters_are_equal_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU counts as a device without float64. The results are the same, since they are computed on a CPU too."""
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))

    def results() -> list[Any]:
        mean = TokenWeightedLoss()
        for loss, tokens in ((2.5, 2**24), (1.5, 1)):
            mean.update(torch.tensor(loss), tokens, torch.tensor(7))
        values = {name: float(value) for name, value in mean.compute().items()}
        mean.reset()
        # Lightning moves them to the device again
        dtypes = {mean.total.dtype, mean.tokens.dtype, mean._defaults["total"].dtype}
        return [values, dtypes, top_p_filter(logits, 0.9).tolist(), entropy(logits.softmax(-1)).tolist()]  # fmt: skip

    expected = results()
    assert expected[0]["tokens"] == 2**24 + 1  # float32 would lose the last token
    assert expected[1] == {torch.float32}
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ("cpu",))
    assert results() == expected


def test_float64_is_refused_for_a_device_without_it(
    command: Command, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ("cpu",))
    assert_refused(
        command("fit", *SMALL_QUICKSTART, "--trainer.precision=64-true"),
        "trainer.precision: cpu has no float64; give 32-true",
    )
    with pytest.raises(ValueError, match="dtype: cpu has no float64; give --dtype float32"):
        load_model(str(trained_run), device="cpu", dtype=torch.float64)


def test_mps_is_named_as_untried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from gpt_lightning.training.run_warnings import device_warnings

    trainer = mock.Mock(precision="32-true")
    trainer.strategy.root_device = torch.device("mps", 0)
    (line,) = device_warnings(trainer)
    assert line.startswith("mps: ")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", lambda *size, device: None)
        patched.setattr(torch, "Generator", lambda device: None)
        assert resolve_device("mps") == "mps"
    assert line in caplog.text
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device(None) != "mps"
