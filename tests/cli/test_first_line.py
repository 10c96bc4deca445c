"""The first line of ``fit``: what it says, when it comes, and when it does not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.run_files import read_rows
from helpers import QUICKSTART, ROOT, SMALL_QUICKSTART, TINY_MODEL, Command, assert_refused, python
from runs import same_bits, same_weights


def test_first_line_names_run_and_configurations(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    config = QUICKSTART.partition("=")[2]
    fit = ("fit", *SMALL_QUICKSTART, *TINY_MODEL, "--trainer.max_steps=1")
    first, *_ = command(*fit).err.splitlines()
    assert first == f"fit: new run quickstart, settings of {config}; starting PyTorch and Lightning"
    first, *_ = command(*fit, "--ckpt_path", "last").err.splitlines()
    assert first.startswith(f"fit: run quickstart, resumed from last, settings of {config};")
    first, *_ = command(*fit, "--ckpt_path=auto", "--run=b").err.splitlines()
    assert first.startswith("fit: run b, new or resumed, ")
    first, *_ = command(*fit, "--run=c", "--init_from=checkpoints/b").err.splitlines()
    assert first.startswith("fit: new run c from the weights of checkpoints/b, ")
    # the last of two values counts, in whichever way they are written; null is no value
    arguments = ("--run=x", "--run", "d", "--ckpt_path=null", "--trainer.fast_dev_run=true")
    first, *_ = command(*fit, *arguments).err.splitlines()
    assert first.startswith("fit: new run d, ")
    inline = "{run: d, ckpt_path: last}"  # only the parser reads it
    first, *_ = command(*fit, "--config", inline).err.splitlines()
    assert first.startswith(f"fit: run, settings of {config};")
    for flag in ("--quiet", "--print_config", "--help", "--help-all"):
        assert "fit: " not in command(*fit, "--run=d", flag).err


def test_mistake_in_a_configuration_comes_before_the_first_line(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text("run: [a")
    for config in ("nowhere.yaml", "bad.yaml"):
        result = command("fit", "--config", config)
        assert_refused(result, config)
        assert result.error == result.err
    result = command("fit", "--model.lrr=1")  # needs Lightning
    assert_refused(result, "model.lrr")
    assert result.err.startswith("fit: new run; starting")


def test_start_and_end_describe_the_run(command: Command) -> None:
    fit = (
        "fit",
        *SMALL_QUICKSTART,
        *TINY_MODEL,
        "--evaluation.eval_freq=2",
        "--evaluation.prompt=null",
    )
    result = command(*fit, "--trainer.max_steps=6", "--trainer.max_epochs=-1")
    lines = result.err.splitlines()
    assert lines[1] == (
        "checkpoints/quickstart: text sample: 6,037 tokens; 15 windows of 16 tokens for training, 136 for validation"
    )
    assert lines[2].endswith("step 0 of 6 (0.857 epochs)")
    evaluated = [line.split() for line in result.out.splitlines()]
    assert [words[3] for words in evaluated] == ["000000):", "000002):", "000004):"]
    last, best, model, done = lines[-4:]
    best_words = min(evaluated, key=lambda words: float(words[-1]))
    assert best == (
        f"best.ckpt: step {int(best_words[3][:6])}, train_loss {best_words[6]} val_loss {best_words[-1]}, "
        "the lowest at an evaluation (every 2 steps)"
    )
    assert model == "generate --from checkpoints/quickstart takes last.ckpt"
    assert done.startswith("checkpoints/quickstart: done")
    # the final evaluation is that of the same step in a run that evaluates each step
    each = command(*fit, "--trainer.max_steps=6", "--trainer.max_epochs=-1", "--run=each",
                   "--evaluation.eval_freq=1")  # fmt: skip
    *_, words = (line.split() for line in each.out.splitlines())
    assert words[3] == "000005):"
    assert last == f"last.ckpt: step 5, train_loss {words[6]} val_loss {words[-1]}"


@pytest.mark.parametrize("rng", ["step", "global"])
def test_final_evaluation_leaves_no_trace(command: Command, rng: str) -> None:
    """A run that is extended equals an uninterrupted run, whose middle is not evaluated."""
    fit = ("fit", *SMALL_QUICKSTART, *TINY_MODEL, "--evaluation.eval_freq=4", f"--rng={rng}",
           "--model.config.drop_rate=0.1", "--trainer.max_epochs=-1")  # fmt: skip
    assert command(*fit, "--run=whole", "--trainer.max_steps=9").code == 0
    for steps in (3, 9):
        arguments = ("--run=parts", f"--trainer.max_steps={steps}", "--ckpt_path=auto")
        assert command(*fit, *arguments).code == 0
    whole, parts = Path("checkpoints/whole"), Path("checkpoints/parts")
    assert same_weights(whole / "last.ckpt", parts / "last.ckpt")
    states = [read_checkpoint(folder / "last.ckpt")["callbacks"] for folder in (whole, parts)]
    assert same_bits(*states)
    evaluations = [
        [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
        for rows in (read_rows(folder / "metrics.csv") for folder in (whole, parts))
    ]
    assert evaluations[0] == evaluations[1]


def test_first_line_appears_before_lightning_is_imported(tmp_path: Path) -> None:
    """Within a second on a quiet machine; here the time of ``--version`` and of importing Lightning are the measure."""
    start = time.perf_counter()
    python("-m", "gpt_lightning", "--version", cwd=tmp_path)
    version = time.perf_counter() - start
    start = time.perf_counter()
    before = []
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "gpt_lightning", "fit", QUICKSTART, "--model.lrr=1"],
        stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("fit: "):
                break
            before.append(line)
        seconds = time.perf_counter() - start
        process.stderr.read()
    assert process.returncode == 2
    modules = {line.rpartition("|")[2].strip() for line in before}
    assert "gpt_lightning.cli.first_line" in modules
    assert not {name for name in modules if name.partition(".")[0] in ("torch", "lightning")}
    assert seconds < 3 * version + 3
