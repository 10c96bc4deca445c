"""Bad settings through the real commands: exit code 2, one line that helps, nothing written."""

import os
from pathlib import Path
from typing import Union

import pytest
from jsonargparse import ArgumentParser

from gpt_lightning.cli.parsing import parse
from helpers import (
    FSDP,
    QUICKSTART,
    SMALL_QUICKSTART,
    Command,
    assert_refused,
)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model.config.emb_dim=15"], ["emb_dim: 15 is not divisible by n_heads 2"]),
        (["--model.config.n_layers=0"], ["n_layers: 0"]),
        (["--model.config.context_length=-4"], ["context_length: -4"]),
        (["--model.config.emb_dim=abc"], ["model.config.emb_dim", "abc"]),
        (["--model.config.drop_rate=1"], ["drop_rate: 1.0 is outside [0, 1)"]),
        (["--model.config.vocab_size=300"], ["vocab_size: 300", "50257"]),
        (["--trainer.reload_dataloaders_every_n_epochs=1"], ["reload_dataloaders_every_n_epochs"]),
        (["--model.lr=-1"], ["model.lr: -1.0"]),
        (["--model.betas=[1.5,0.9]"], ["model.betas: (1.5, 0.9)"]),
        (["--model.warmup_steps=-1"], ["model.warmup_steps: -1"]),
        (["--model.decay_steps=5"], ["model.decay_steps: 5 is not after the 10 warmup_steps"]),
        (["--model.min_lr=5"], ["model.min_lr: 5.0 is above model.lr"]),
        (["--model.initial_lr=5"], ["model.initial_lr: 5.0 is above model.lr"]),
        (["--model.initial_lr=-1"], ["model.initial_lr: -1.0 is out of range"]),
        (["--model.warmup_steps=1.5"], ["1.5 is neither a whole number of steps nor a share"]),
        (["--model.warmup_steps=10.0"], ["10.0 is neither", "give a whole number, such as 10"]),
        (["--model.warmup_steps=-0.1"], ["-0.1 is neither"]),
        (["--model.warmup_steps=.nan"], ["model.warmup_steps", "nan"]),
        (
            ["--model.decay_steps=0.5", "--model.warmup_steps=1"],
            ["model.decay_steps: 0.5 is step 0 of 1, which is not after the 1 steps"],
        ),
        (["--model.decay_steps=0.1", "--model.warmup_steps=0.2"], ["0.1 is not after the 0.2"]),
        (
            ["--model.lr_schedule=constant", "--model.decay_steps=20"],
            ["model.lr_schedule: constant has no end of a decay, and model.decay_steps is 20"],
        ),
        (
            ["--model.lr_schedule=inverse_sqrt", "--model.decay_steps=1.0"],
            ["model.lr_schedule: inverse_sqrt has no end of a decay"],
        ),
        (
            ["--model.lr_schedule=inverse_sqrt", "--model.warmup_steps=0"],
            ["model.lr_schedule: inverse_sqrt", "give model.warmup_steps"],
        ),
        (["--model.lr_schedule=cosin"], ["model.lr_schedule: cosin", "did you mean cosine?"]),
        (["--model.decay_type=linear"], ["model.decay_type: linear has an effect only with"]),
        (
            ["--model.lr_schedule=linear", "--model.decay_fraction=0.1"],
            ["model.decay_fraction: 0.1 has an effect only with model.lr_schedule wsd"],
        ),
        (["--model.lr_schedule=wsd", "--model.decay_fraction=0"], ["decay_fraction: 0.0 is not a"]),
        (["--model.lr_schedule=wsd", "--model.decay_type=exp"], ["model.decay_type: exp"]),
        (
            ["--model.lr_schedule=wsd", "--model.decay_steps=20", "--model.decay_fraction=0.6"],
            ["0.6 of 20 steps starts the decay at step 8, before the end of the 10 warmup_steps"],
        ),
        (["--checkpoint.max_to_keep=0"], ["checkpoint.max_to_keep: 0 is too small; give 1"]),
        (["--checkpoint.max_to_keep=2"], ["checkpoint.max_to_keep: 2 has no effect without"]),
        (
            ["--checkpoint.keep_every_n_train_steps=0"],
            ["checkpoint.keep_every_n_train_steps: 0 is too small"],
        ),
        (["--model.clip_from_step=1"], ["clip_from_step: 1 is beyond the run, which has 1 step;"]),
        (["--model.clip_from_step=1.0"], ["clip_from_step: 1.0 is beyond the run"]),
        (["--model.clip_from_step=-1"], ["clip_from_step: -1 is negative"]),
        (
            ["--model.warmup_steps=0.5", "--trainer.max_steps=-1", "--trainer.max_epochs=-1"],
            ["model.warmup_steps: 0.5 is a share of the run, which has no end"],
        ),
        (["--data.context_length=17"], ["data.context_length: 17 is more than the model's 16"]),
        (["--trainer.accelerator=gpu"], ["trainer.accelerator: no GPU is available"]),
        (["--data.batch_size=0"], ["data.batch_size: 0"]),
        (["--data.batch_size=5000"], ["data.batch_size: 5000", "training windows"]),
        (["--data.stride=0"], ["data.stride: 0"]),
        (["--data.train_ratio=1.5"], ["data.train_ratio: 1.5"]),
        (["--data.train_ratio=1.0"], ["data.train_ratio: 1.0"]),
        (["--data.train_ratio=0.99999"], ["validation split", "tokens, one window needs 17"]),
        (["--evaluation.eval_freq=0"], ["evaluation.eval_freq: 0"]),
        (["--evaluation.eval_iter=0"], ["evaluation.eval_iter: 0"]),
        (["--evaluation.prompt="], ["evaluation.prompt: is empty"]),
        (["--checkpoint.every_n_train_steps=0"], ["checkpoint.every_n_train_steps: 0"]),
        (["--model.lrr=1"], ["model.lrr", "did you mean model.lr?"]),
        (["--data.tekst=x"], ["did you mean data.text?"]),
        (["--rng=dice"], ["rng"]),
        (["--seed_everything=yes"], ["seed_everything"]),
        (["--run=../elsewhere"], ["run: ../elsewhere"]),
        (["--run="], ["run: "]),
        (["--ckpt_path=last"], ["ckpt_path", "last.ckpt"]),
        (["--ckpt_path=nowhere.ckpt"], ["nowhere.ckpt: does not exist"]),
        (["--init_from=nowhere"], ["nowhere: does not exist"]),
        (["--config=nowhere.yaml"], ["nowhere.yaml"]),
        (["--trainer.max_epochs=two"], ["trainer.max_epochs", "two"]),
        (["--data.text=nowhere.txt"], ["data.text: nowhere.txt does not exist"]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) and value[0].startswith("-") else "",
)
def test_bad_setting_is_refused(
    refused_fit: Command, arguments: list[str], parts: list[str]
) -> None:
    assert_refused(refused_fit(*arguments), *parts)


def test_null_setting_is_refused(refused_fit: Command, command: Command, tmp_path: Path) -> None:
    for dest in ("model.lr", "model.config.emb_dim", "data.batch_size", "checkpoint.save_best"):
        *groups, name = dest.split(".")
        lines = [f"{'  ' * i}{part}:" for i, part in enumerate([*groups, name])]
        (tmp_path / "mine.yaml").write_text("\n".join(lines) + "\n")
        result = command("fit", QUICKSTART, "--config=mine.yaml")
        assert_refused(result, f"{dest}: is null; give a value, or leave it out")
    (tmp_path / "mine.yaml").write_text("temperature:\n")
    result = command("generate", "--from=x", "--prompt=x", "--config=mine.yaml")
    assert_refused(result, "temperature: is null")


def test_integer_stays_an_integer() -> None:
    """1 is one batch and 1.0 is all batches; which type is tried first depends on the imports."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--batches", type=Union[float, int, None])  # noqa: UP007
    for given, value in {"1": 1, "1.0": 1.0, "null": None}.items():
        found = parse(parser, [f"--batches={given}"]).batches
        assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    "arguments",
    [
        "fit --trainer.gradient_clip_val=.nan",
        "fit --trainer.gradient_clip_val=1.0e+999",
        "fit --trainer.limit_train_batches=.nan",
        "fit --trainer.limit_val_batches=.inf",
        "fit --trainer.overfit_batches=.nan",
        "fit --trainer.val_check_interval=.nan",
        "fit --model.lr=.nan",
        "fit --model.weight_decay=.inf",
        "fit --model.betas=[0.9,.nan]",
        "fit --model.min_lr=.nan",
        "fit --model.config.drop_rate=.nan",
        "fit --model.config.attn_drop_rate=.nan",
        "fit --data.train_ratio=.nan",
        "fit --data.mixture={a:~.nan}",
        "fit --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=x --trainer.callbacks.min_delta=.nan",
        "validate --model.lr=-.inf",
        "plan --mfu=.nan",
        "plan --peak_tflops=.inf",
        "plan --device_memory_gb=1e999",
        "generate --from=x --prompt=x --temperature=.nan",
        "generate --from=x --prompt=x --top_p=.nan",
        "generate --from=x --prompt=x --min_p=.nan",
        "generate --from=x --prompt=x --repetition_penalty=.inf",
        "prepare x --out=x --val_ratio=.nan",
        "report sampling --temperatures=[1.0,.inf]",
        "report sampling --logits=[.inf,1.0]",
        "report sweep --from=x --prompt=x --top_p=[.nan]",
        "report sizes --from=x --prompt=x --max_memory=.nan",
        "report sizes --from=x --prompt=x --train_ratio=.nan",
    ],
)
def test_number_that_is_not_finite_is_refused(command: Command, arguments: str) -> None:
    words = [word.replace("~", " ") for word in arguments.split()]
    setting = words[-1].partition("=")[0].removeprefix("--")
    assert_refused(command(*words), setting, "is not a finite number")
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("fit --trainer.precision=fp16", "trainer.precision: fp16 is unknown; did you mean 16-mixed?"),
        ("fit --trainer.precision=8", "trainer.precision: 8 is unknown; give one of 64, 32, 16, "),
        ("fit --trainer.accelerator=gpus", "gpus is unknown; did you mean gpu?"),
        ("fit --trainer.strategy=dpp", "dpp is unknown; did you mean ddp?"),
        ("fit --trainer.strategy=fsdp", "to shard the model, give --config configs/fsdp.yaml"),
        ("fit --trainer.devices=zero", "zero is not a number of devices; give 1 or more, or auto"),
        ("fit --trainer.devices=[0,0]", "[0, 0] is not a list of different devices"),
        ("fit --trainer.max_epochs=two", "two is not a whole number; give one, or null"),
        ("fit --trainer.max_epochs=-7", "trainer.max_epochs: -7 is too small; give -1 or more"),
        ("fit --trainer.max_time=1h", "1h is not a duration; give days:hours:minutes:seconds"),
        ("fit --trainer.accumulate_grad_batches=0", "0 is too small; give 1 or more"),
        ("fit --trainer.max_epochs=0", "trainer.max_epochs: 0 trains nothing"),
        ("fit --trainer.max_steps=0", "trainer.max_steps: 0 trains nothing"),
        ("fit --trainer.limit_train_batches=0.0", "trainer.limit_train_batches: 0.0 trains nothing"),
        ("fit --trainer.gradient_clip_val=-1", "-1 is too small; give 0 or more"),
        ("fit --trainer.gradient_clip_algorithm=nrom", "nrom is unknown; did you mean norm?"),
        ("fit --trainer.limit_train_batches=1.5", "1.5 is neither a fraction nor a number of batches"),
        ("fit --trainer.deterministic=maybe", "maybe is unknown; give one of warn, true, false"),
        ("fit --trainer.benchmark=x", "x is not true or false"),
        ("fit --trainer.profiler=simpel", "simpel is unknown; did you mean simple?"),
        ("fit --trainer.logger=tensorbord", "is not a Logger; did you mean TensorBoardLogger?"),
        ("fit --trainer.logger=CSVLogger", "CSVLogger needs save_dir; give trainer.logger.save_dir"),
        ("fit --trainer.callbacks=EarlyStoping", "not a Callback; did you mean EarlyStopping?"),
        ("fit --trainer.callbacks+=EarlyStopping", "EarlyStopping needs monitor"),
        ("fit --trainer.callbacks+=Timer --trainer.callbacks.durration=1", "did you mean duration?"),
        ("fit --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=x "
         "--trainer.callbacks.patience=x", "callbacks.patience: x is not a whole number"),
        ("fit --trainer.plugins=foo", "foo is not a Precision or "),
        ("fit --model.lr=x", "model.lr: x is not a number; give one, such as 0.0004"),
        ("fit --model.betas=0.9", "0.9 is not a list; give one, such as '[0.9, 0.95]'"),
        ("fit --model.betas=[0.9]", "[0.9] is not a list of 2; give as many values"),
        ("fit --model.warmup_steps=1e3", "1000.0 is neither a whole number of steps nor a share"),
        ("fit --model.warmup_steps=few", "model.warmup_steps: few is not a"),
        ("fit --max_tokens=1e9", "1e9 is not a whole number; write 1000000000"),
        ("fit --model.compile=2", "model.compile: 2 is not true or false"),
        ("fit --model=nowhere.yaml", "model: is neither settings nor a file of them"),
        ("fit --data.mixture=sample", "sample is not a mapping; give one, such as '{a.txt: 0.7"),
        ("fit --data.mixture={sample:~x}", "data.mixture: x is not a number"),
        ("fit --rng=dice", "rng: dice is unknown; give one of step, global"),
        ("fit --checkpoint.on_failure=x", "x is unknown; give one of continue, stop"),
        ("fit --seed_everything=-1", "-1 is out of range; give 0 to 4294967295"),
        ("fit --run", "run: has no value; give one after --run"),
        ("fit stray", "stray: is not an option"),
        ("plan --trainer.num_nodes=-3", "trainer.num_nodes: -3 is too small; give 1 or more"),
        ("plan --gpu=h100", "did you mean H100?"),
        ("validate --trainer.accelerator=cuda0", "did you mean cuda?"),
        ("generate --from=x --prompt=x --dtype=half", "half is unknown; did you mean float16?"),
        ("generate --from=x --prompt=x --json=true", "json: takes no value; give --json alone"),
        ("generate --from=x --prompt=x --top_k=1.5", "top_k: 1.5 is not a whole number"),
        ("report sampling --temperatures=1", "1 is not a list; give one, such as '[1, 2]'"),
        ("prepare", "inputs, out: are missing; give INPUT --out OUT"),
        ("prepare x --out=x --split=random", "random is unknown; did you mean ratio?"),
        ("prepare x --out=x --shard_tokens=1e8", "write 100000000"),
        ("convert", "source, dest: are missing; give SOURCE DEST"),
        ("convert a b --format=huggingface", "huggingface is unknown; did you mean hf?"),
        ("download gpt2-124M --host=hf", "hf is unknown; did you mean hub?"),
        ("verify-resume --steps=x", "steps: x is not a whole number; give one"),
        ("train", "train: is not a command; did you mean fit?"),
    ],
)  # fmt: skip
def test_wrong_value_is_refused_in_plain_words(command: Command, arguments: str, line: str) -> None:
    result = command(*(word.replace("~", " ") for word in arguments.split()))
    assert_refused(result, line)
    assert len(result.error) < 200
    for word in ("<class", "typing.", "Union", "NoneType", "Namespace"):
        assert word not in result.err
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data.global_batch_size=0"], ["data.global_batch_size: 0 is too small"]),
        (
            ["--data.global_batch_size=5"],
            ["global_batch_size: 5 cannot be split over 1 device(s) with a batch_size of 2", "nearest that can is 6"],
        ),
        (
            ["--data.global_batch_size=7", "--trainer.devices=3", "--trainer.strategy=ddp", "--data.batch_size=1"],
            ["7 cannot be split over 3 device(s)", "is 6"],
        ),
        (["--data.global_batch_size=500"], ["500 is more than the 15 training windows"]),
        (["--data.global_batch_tokens=100"], ["100 is not a multiple of the window length, 16", "96"]),
        (["--data.global_batch_tokens=48"], ["global_batch_tokens: 48 cannot be split", "is 64"]),
        (["--data.global_batch_tokens=8000"], ["8000 is more than the 15 training windows of 16"]),
        (
            ["--data.global_batch_tokens=64", "--data.global_batch_size=4"],
            ["global_batch_size is given too"],
        ),
        (
            ["--data.global_batch_size=4", "--trainer.accumulate_grad_batches=3"],
            ["accumulate_grad_batches: 3 contradicts data.global_batch_size 4", "is 2 batches of 2"],
        ),
        (
            ["--trainer.devices=16", "--trainer.strategy=ddp"],
            ["trainer.devices: 16 are more than the 15 training windows"],
        ),
        (["--max_tokens=0"], ["max_tokens: 0 is too small"]),
        (["--data.mixture={}"], ["data.mixture: is empty"]),
        (["--data.mixture={sample: 0}"], ["data.mixture: sample has the weight 0"]),
        (["--data.mixture={sample: -1.5}"], ["sample has the weight -1.5"]),
        (["--data.mixture={sample: .nan}"], ["data.mixture.sample: nan is not a finite number"]),
        (["--data.mixture={sample: much}"], ["data.mixture", "much"]),
        (["--data.mixture={nowhere.txt: 1}"], ["nowhere.txt does not exist"]),
        (["--data.mixture={sample: 1}", "--rng=global"], ["data.mixture: the book's order"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("-") else "",
)  # fmt: skip
def test_bad_data_setting_is_refused(
    command: Command, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    assert_refused(command("fit", *SMALL_QUICKSTART, "--trainer.max_steps=1", *arguments), *parts)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--trainer.strategy=ddp_spawn", "--trainer.devices=2"], "trainer.strategy: ddp_spawn is unknown; did you mean ddp?"),
        (["--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy"],
         "trainer.strategy: ModelParallelStrategy does not write checkpoints"),
        (["--trainer.strategy=fsdp"], "trainer.strategy: fsdp is unknown; to shard the model, give --config configs/fsdp.yaml"),
        (["--trainer.strategy=nonsense"], "trainer.strategy: nonsense is unknown; give one of auto, ddp"),
        ([*FSDP, "--trainer.precision=16-mixed"], "Choose a different precision among"),
        ([*FSDP, "--trainer.strategy.process_group_backend=tcp"], "process_group_backend"),
        (["--trainer.devices=-3"], "trainer.devices: -3 is not a number of devices"),
        (["--trainer.num_nodes=0"], "trainer.num_nodes: 0 is too small"),
        ([*FSDP, "--data.batch_size=100"], "data.batch_size: 100 on 2 device(s) is more than the"),
    ],
)  # fmt: skip
def test_bad_device_setting_is_refused(command: Command, arguments: list[str], cause: str) -> None:
    result = command("fit", *SMALL_QUICKSTART, *arguments)
    assert (result.code, result.out) == (2, "")
    assert len(result.error.splitlines()) == 1
    assert result.error.startswith("gpt_lightning: error: ")
    assert cause in result.err
    assert not Path("checkpoints").exists()
