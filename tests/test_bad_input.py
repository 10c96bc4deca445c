"""A user's mistakes through the real command: exit code 2, one line that helps, nothing written."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Union

import pytest
from conftest import ROOT, SMALL, Command, Done, python
from jsonargparse import ArgumentParser

from gpt_lightning.cli.parsing import parse
from gpt_lightning.data import corpus
from gpt_lightning.storage.cache import cache_folder

QUICKSTART = f"--config={ROOT}/configs/quickstart.yaml"


def refused(done: Done, *parts: str) -> None:
    assert done.code == 2, done.err
    assert done.out == ""
    assert done.err.startswith("gpt_lightning: error: ")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    for part in parts:
        assert part in done.err


@pytest.fixture
def refused_fit(command: Command, tmp_path: Path) -> Iterator[Command]:
    """``fit`` on a small setting; whatever it was refused for, it left no run behind."""

    def run(*arguments: str) -> Done:
        return command("fit", QUICKSTART, *SMALL, "--trainer.max_steps=1", *arguments)

    yield run
    assert not (tmp_path / "checkpoints").exists()


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
def test_settings(refused_fit: Command, arguments: list[str], parts: list[str]) -> None:
    refused(refused_fit(*arguments), *parts)


def test_texts(refused_fit: Command, tmp_path: Path) -> None:
    files = {
        "empty.txt": b"",
        "blank.txt": b" \n\n ",
        "latin.txt": "Übermut tut selten gut. ".encode("latin-1") * 100,
        "short.txt": b"Only a few words, no window.",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    refused(refused_fit("--data.text=empty.txt"), "data.text: empty.txt is empty")
    refused(refused_fit("--data.text=blank.txt"), "data.text: blank.txt is empty")
    refused(refused_fit("--data.text=latin.txt"), "latin.txt is not UTF-8")
    refused(refused_fit("--data.text=folder"), "folder holds no text files")
    refused(
        refused_fit("--data.text=short.txt", "--data.train_ratio=0.9"),
        "training split of short.txt has 7 tokens, one window needs 17",
    )


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_unreadable_file(refused_fit: Command) -> None:
    refused(refused_fit("--data.text=/proc/self/mem"), "/proc/self/mem cannot be read")


def test_unknown_keys_in_yaml(refused_fit: Command, tmp_path: Path) -> None:
    for text, near in [
        ("model:\n  config:\n    emb_dimm: 8\n", "did you mean model.config.emb_dim?"),
        ("evaluation:\n  eval_frequ: 8\n", "did you mean evaluation.eval_freq?"),
        ("modell:\n  lr: 8\n", "did you mean model.lr?"),
        ("seed_everythin: 8\n", "did you mean seed_everything?"),
    ]:
        (tmp_path / "mine.yaml").write_text(text)
        refused(refused_fit("--config=mine.yaml"), near)


def test_yaml_that_is_none(refused_fit: Command, tmp_path: Path) -> None:
    for content, cause in {
        b"{": "mine.yaml: line 2: is not YAML (",
        b"model:\n\tlr: 1\n": "mine.yaml: line 2: is not YAML (found character that cannot start",
        b"run: !!python/object/apply:os.system [ls]\n": "only plain values are allowed",
        b"- 1\n- 2\n": "mine.yaml: holds no settings",
        b"just words": "mine.yaml: holds no settings",
        b"": "mine.yaml: holds no settings",
        b"null\n": "config: null is not a mapping of settings",
        b"run: a\n---\nrun: b\n": "mine.yaml: line 2: begins a second document",
        b"? [a, b]\n: 1\n": "mine.yaml: line 1: a key must be one word",
        b"1: 2\n": "1: is not the name of a setting",
        b"data:\n  mixture: {1984: 1.0}\n": "data.mixture: 1984 is not text; put it in quotes",
        b"\xff\xfe\x00": "config: mine.yaml is UTF-16, not UTF-8",
        "run: Übung".encode("latin-1"): "config: mine.yaml is not UTF-8",
    }.items():
        (tmp_path / "mine.yaml").write_bytes(content)
        refused(refused_fit("--config=mine.yaml"), cause)


def test_keys_given_twice(refused_fit: Command, command: Command, tmp_path: Path) -> None:
    for content, cause in {
        "model:\n  lr: 1\n  lr: 2\n": "mine.yaml: model.lr is given twice, in lines 2 and 3",
        "model:\n  lr: 1\ndata:\n  seed: 1\nmodel:\n  min_lr: 1\n": "model is given twice",
        "model:\n  lr: 1\nmodel.lr: 2\n": "model.lr is given twice, in lines 2 and 3",
        "data:\n  mixture: {a: 1, b: 2, a: 3}\n": "data.mixture.a is given twice, in line 2",
        "model: {lr: 1, 'lr': 1}\n": "model.lr is given twice",
        "trainer:\n  callbacks:\n  - class_path: x\n    class_path: y\n": "callbacks[0].class_path",
        '{"model": {"lr": 1, "lr": 2}}': "model.lr is given twice, in line 1",
    }.items():
        (tmp_path / "mine.yaml").write_text(content)
        refused(refused_fit("--config=mine.yaml"), cause)
    refused(refused_fit("--data.mixture={a: 1, a: 2}"), "a is given twice")
    refused(refused_fit("--config={run: a, run: b}"), "run is given twice")
    (tmp_path / "model.yaml").write_text("lr: 1\nlr: 2\n")
    refused(refused_fit("--model=model.yaml"), "lr is given twice, in lines 1 and 2")
    (tmp_path / "mine.yaml").write_text("seed: 1\nprompt: x\nseed: 2\n")
    for verb in ("generate", "prepare", "convert", "report sampling", "report sweep", "plan"):
        done = command(*verb.split(), "--config=mine.yaml")
        refused(done, "mine.yaml: seed is given twice, in lines 1 and 3; keep one of them")
    # text that looks like it stays text
    text = "--evaluation.prompt={a: 1, a: 2}"
    refused(refused_fit(text, "--trainer.max_epochs=-2"), "trainer.max_epochs: -2")


def nested_anchors(form: str) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    for level in range(1, 10):
        items = [f"*a{level - 1}"] * 9
        content = form.format(
            list=", ".join(items), map=", ".join(f"k{i}: {item}" for i, item in enumerate(items))
        )
        lines.append(f"a{level}: &a{level} {content}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("yaml", "cause"),
    [
        (nested_anchors("[{list}]"), "has more than 20,000 values"),
        (nested_anchors("{{{map}}}"), "has more than 20,000 values"),
        (nested_anchors("{{<<: [{list}]}}"), "has more than 20,000 values"),
        ("trainer:\n  callbacks: &a [*a]\n", "line 2: *a contains itself"),
        ("model: &a\n  config: *a\n", "line 2: *a contains itself"),
        (f"run: {'[' * 100_000}", "nested more than 50 levels"),
        ("".join(f"{'  ' * depth}a:\n" for depth in range(60)), "nested more than 50 levels"),
        (f"data:\n  mixture: {{{'a: 1, ' * 100_000}}}", "is given twice"),
        (f"trainer:\n  callbacks: [{'x, ' * 100_000}]", "has more than 20,000 values"),
        (f"run: {'x' * 2_000_000}", "has more than 1,000,000 characters"),
        (f"run: {'x' * 9_000_000}", "is too large for a configuration"),
    ],
    ids=lambda value: value[:30].replace("\n", " "),
)
def test_yaml_is_bounded(refused_fit: Command, tmp_path: Path, yaml: str, cause: str) -> None:
    (tmp_path / "mine.yaml").write_text(yaml)
    before = time.process_time()
    refused(refused_fit("--config=mine.yaml"), cause)
    assert time.process_time() - before < 1.0


def test_a_deep_value_on_the_command_line(refused_fit: Command) -> None:
    refused(refused_fit(f"--model.betas={'[' * 50_000}"), "model.betas: ")


@pytest.mark.parametrize(
    "group",
    ["model", "model.config", "data", "trainer", "evaluation", "checkpoint", "throughput"],
)
def test_groups_without_settings(refused_fit: Command, tmp_path: Path, group: str) -> None:
    for value in ("", " [1]"):
        *outer, inner = group.split(".")
        prefix = "".join(f"{'  ' * i}{name}:\n" for i, name in enumerate(outer))
        (tmp_path / "mine.yaml").write_text(f"{prefix}{'  ' * len(outer)}{inner}:{value}\n")
        done = refused_fit("--config=mine.yaml", "--trainer.accelerator=cpu")
        refused(done, f"{group}", "leave it out")
    refused(refused_fit(f"--{group}=null"), f"{group}: ")


def test_settings_that_are_null(refused_fit: Command, command: Command, tmp_path: Path) -> None:
    for dest in ("model.lr", "model.config.emb_dim", "data.batch_size", "checkpoint.save_best"):
        *groups, name = dest.split(".")
        lines = [f"{'  ' * i}{part}:" for i, part in enumerate([*groups, name])]
        (tmp_path / "mine.yaml").write_text("\n".join(lines) + "\n")
        done = command("fit", QUICKSTART, "--config=mine.yaml")
        refused(done, f"{dest}: is null; give a value, or leave it out")
    (tmp_path / "mine.yaml").write_text("temperature:\n")
    done = command("generate", "--from=x", "--prompt=x", "--config=mine.yaml")
    refused(done, "temperature: is null")


def test_a_whole_number_stays_one() -> None:
    """One batch is 1, all batches are 1.0; which of both typing tries first depends on what is imported."""
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
def test_numbers_that_are_not_finite(command: Command, arguments: str) -> None:
    words = [word.replace("~", " ") for word in arguments.split()]
    setting = words[-1].partition("=")[0].removeprefix("--")
    refused(command(*words), setting, "is not a finite number")
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        ("fit --trainer.max_epoch=1", "trainer.max_epochs"),
        ("fit --trainer.max_ep=1", "trainer.max_epochs"),
        ("fit --seed=1", "seed_everything"),
        ("fit --lr=1", "model.lr"),
        ("fit --epochs=1", "trainer.max_epochs"),
        ("fit --learning_rate=1", "model.lr"),
        ("fit --model.learning_rate=1", "model.lr"),
        ("fit --batch_size=1", "data.batch_size"),
        ("fit --n_layer=1", "model.config.n_layers"),
        ("fit --model.emb_dim=1", "model.config.emb_dim"),
        ("fit --block_size=1", "model.config.context_length"),
        ("fit --gpus=1", "trainer.devices"),
        ("fit --output_dir=x", "trainer.default_root_dir"),
        ("fit --config={trainer:~{max_epoch:~1}}", "trainer.max_epochs"),
        ("validate --ckpt=x", "ckpt_path"),
        ("plan --train_token=1", "train_tokens"),
        ("generate --temp=1", "temperature"),
        ("generate --max_length=1", "max_new_tokens"),
        ("generate --model=x", "from"),
        ("prepare x --output=x", "out"),
        ("prepare x --out=x --val=1", "val_ratio"),
        ("convert a b --to=hf", "format"),
        ("convert a b --form=hf", "format"),
        ("download gpt2-124M --hots=hub", "host"),
        ("report sampling --temp=[1]", "temperatures"),
        ("report sweep --num_sample=1", "num_samples"),
        ("report sizes --text_=x", "text"),
        ("verify-resume --step=1", "steps"),
        ("verify-resume --more=1", "more_steps"),
    ],
)
def test_nearest_setting(command: Command, arguments: str, near: str) -> None:
    done = command(*(word.replace("~", " ") for word in arguments.split()))
    refused(done, "is not a setting", f"did you mean {near}?")


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
        ("fit --model.warmup_steps=1e3", "1000.0 is not a whole number; write 1000"),
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
        ("convert", "source, dest, format: are missing; give SOURCE DEST --format FORMAT"),
        ("convert a b --format=huggingface", "huggingface is unknown; did you mean hf?"),
        ("download gpt2-124M --host=hf", "hf is unknown; did you mean hub?"),
        ("verify-resume --steps=x", "steps: x is not a whole number; give one"),
        ("train", "train: is not a command; did you mean fit?"),
    ],
)  # fmt: skip
def test_a_wrong_value_in_the_users_words(command: Command, arguments: str, line: str) -> None:
    done = command(*(word.replace("~", " ") for word in arguments.split()))
    refused(done, line)
    assert len(done.err) < 200
    for word in ("<class", "typing.", "Union", "NoneType", "Namespace"):
        assert word not in done.err
    assert os.listdir() == []


def test_a_user_who_is_not_there_has_no_home(command: Command) -> None:
    for arguments in (["validate", "--init_from=~nobody/run"], ["generate", "--from=~nobody/run", "--prompt=A"],
                      ["convert", "~nobody/run", "x", "--format=hf"]):  # fmt: skip
        refused(command(*arguments), "~nobody/run: does not exist")


def test_nearest_configuration(command: Command, tmp_path: Path) -> None:
    for name in ("configs/quickstart.yaml", "configs/verdict.yaml", "other/notes.md", "mine.yml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("run: x\n")
    for given, near in {
        "config/quickstart.yaml": "configs/quickstart.yaml",
        "configs/quikstart.yaml": "configs/quickstart.yaml",
        "quickstart": "configs/quickstart.yaml",
        "verdict.yml": "configs/verdict.yaml",
        "min.yml": "mine.yml",
    }.items():
        for verb in ("fit", "generate"):
            done = command(verb, "--config", given)
            refused(done, f"config: {given} does not exist; did you mean {near}?")
    refused(command("fit", "-c", "zzz"), "config: zzz does not exist; give a YAML file")
    refused(command("fit", "--config=configs"), "config: configs is a folder; give a YAML file")


@pytest.mark.parametrize(
    "yaml",
    [
        "trainer:\n  callbacks:\n  - class_path: evil.Canary\n",
        "trainer:\n  logger:\n    class_path: evil.Canary\n",
        "trainer:\n  callbacks:\n  - class_path: lightning.pytorch.callbacks.LambdaCallback\n"
        "    init_args:\n      on_fit_start: os.system\n",
    ],
)
def test_class_paths_from_elsewhere_are_not_imported(
    refused_fit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yaml: str
) -> None:
    (tmp_path / "evil.py").write_text("open('canary', 'w').close()\nclass Canary: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml)
    refused(refused_fit("--config=mine.yaml"), "is not imported from a configuration")
    assert not (tmp_path / "canary").exists()


def test_no_checkpoint(refused_fit: Command, tmp_path: Path) -> None:
    import torch

    (tmp_path / "words.ckpt").write_text("no checkpoint at all")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.ckpt")
    torch.save(torch.ones(2), tmp_path / "tensor.ckpt")
    torch.save({"state_dict": Path("x"), "hyper_parameters": {}}, tmp_path / "objects.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 0.1}}, tmp_path / "foreign.ckpt")
    for name, cause in {
        "words": "is not a torch.save file",
        "empty": "is not a torch.save file",
        "other": "is not a gpt_lightning checkpoint",
        "tensor": "is not a gpt_lightning checkpoint",
        "objects": "may be code, so it is not loaded",
        "foreign": "is not a gpt_lightning checkpoint",
    }.items():
        for option in ("--ckpt_path", "--init_from"):
            refused(refused_fit(f"{option}={name}.ckpt"), f"{name}.ckpt: ", cause)


def test_a_run_in_the_folder_is_not_overwritten(command: Command, tmp_path: Path) -> None:
    arguments = ("fit", QUICKSTART, *SMALL, "--trainer.max_steps=1")
    assert command(*arguments).code == 0
    folder = tmp_path / "checkpoints" / "quickstart"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    refused(command(*arguments), "holds a run already", "--ckpt_path last", "--run NAME")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    (folder / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:10_000])
    refused(command(*arguments, "--ckpt_path=last"), "last.ckpt is damaged: it has 10,000 bytes")


class NotTheVerdict(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>not the text</title>")

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def wrong_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), NotTheVerdict)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/the-verdict.txt"
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_with_a_wrong_sum(
    refused_fit: Command, wrong_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "VERDICT_URL", wrong_server)
    done = refused_fit("--data.text=verdict")
    refused(done, "SHA-256 differs", str(tmp_path / "cache" / "the-verdict.txt"))
    assert not list((tmp_path / "cache").glob("*"))


def test_no_network(refused_fit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "VERDICT_URL", "http://127.0.0.1:9/the-verdict.txt")
    done = refused_fit("--data.text=verdict")
    refused(done, "cannot be downloaded", f"at {tmp_path / 'cache' / 'the-verdict.txt'}")


def test_another_text_in_the_verdicts_place(refused_fit: Command, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "the-verdict.txt").write_text("Call me Ishmael.")
    refused(refused_fit("--data.text=verdict"), "is not The Verdict", "remove it")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gpt_lightning.cli.main import main

    folder = tmp_path_factory.mktemp("trained")
    root = f"--trainer.default_root_dir={folder}"
    assert main(["fit", QUICKSTART, *SMALL, "--trainer.max_steps=1", root]) == 0
    return folder / "checkpoints" / "quickstart"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prompt="], ["prompt: is empty"]),
        ([], ["prompt: is empty"]),
        (["--prompt=x", "--temperature=-1"], ["temperature: -1.0"]),
        (["--prompt=x", "--temperature=nan"], ["temperature", "nan"]),
        (["--prompt=x", "--top_k=0"], ["top_k: 0"]),
        (["--prompt=x", "--top_k=60000"], ["top_k: 60000", "50257"]),
        (["--prompt=x", "--max_new_tokens=-1"], ["max_new_tokens: -1"]),
        (["--prompt=x", "--promt=y"], ["did you mean prompt?"]),
        (["--prompt=x", "--device=warp"], ["device: warp"]),
        (["--prompt=x", "--stream=true", "--top_k=60000"], ["top_k: 60000", "50257"]),
        (["--prompt=x", "--stream=true", "--stop="], ["stop: is empty"]),
        (["--prompt=x", "--seed=99999999999999999999"], ["seed: ", "64 bits"]),
        (["--prompt=x", "--max_new_tokens=1000000000000"], ["max_new_tokens: 1000000000000"]),
    ],
)
def test_generate(command: Command, trained: Path, arguments: list[str], parts: list[str]) -> None:
    refused(command("generate", f"--from={trained}", *arguments), *parts)


def test_generate_from_what_is_no_model(command: Command, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "config.yaml", tmp_path / "config.yaml")
    refused(command("generate", "--from=config.yaml", "--prompt=x"), "is not a torch.save file")
    refused(command("generate", f"--from={tmp_path}", "--prompt=x"), "last.ckpt")
    refused(command("generate", "--prompt=x"), "--from SOURCE")


def test_full_disk_leaves_the_checkpoint_before(command: Command, tmp_path: Path) -> None:
    arguments = ("fit", QUICKSTART, *SMALL)
    assert command(*arguments, "--trainer.max_steps=1").code == 0
    last = tmp_path / "checkpoints" / "quickstart" / "last.ckpt"
    before = last.read_bytes()
    limited = (
        "import resource, sys; from gpt_lightning.cli.main import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)); sys.exit(main(sys.argv[1:]))"
    )
    more = ("--trainer.max_steps=2", "--ckpt_path=last")
    done = python("-c", limited, *arguments, *more, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "last.ckpt: cannot be written" in done.stderr or "best.ckpt: cannot" in done.stderr
    assert last.read_bytes() == before
    assert not list(last.parent.glob(".*"))


def test_unknown_command(command: Command) -> None:
    refused(command("trian"), "trian: is not a command")
    refused(command("fitt"), "did you mean fit?")


def test_debug_shows_the_traceback(command: Command) -> None:
    with pytest.raises(OSError, match="nowhere: does not exist"):
        command("generate", "--from=nowhere", "--prompt=x", "--debug")


def test_unwritable_folder(command: Command, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    done = command("fit", QUICKSTART, *SMALL, "--trainer.max_steps=1")
    refused(done, "checkpoints")
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_home_folder_wherever_a_path_is_read(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", "~/cache")
    for name in ("a.txt", "b.txt"):
        (home / name).write_text(f"A story of {name} that is told again and again. " * 40)
    (home / "mine.yaml").write_text(
        "trainer:\n  default_root_dir: ~/runs\n  max_steps: 1\n"
        "  logger: {class_path: CSVLogger, init_args: {save_dir: ~/logs}}\n"
        "data:\n  mixture: {~/a.txt: 1, ~/b.txt: 1}\n"
    )
    run = "~/runs/checkpoints/quickstart"
    own = ("--config=~/mine.yaml", "--data.train_ratio=0.5")
    for arguments in [
        ("fit", QUICKSTART, *SMALL, *own),
        ("fit", QUICKSTART, *SMALL, *own, f"--ckpt_path={run}/last.ckpt"),
        ("fit", QUICKSTART, *SMALL, *own, f"--init_from={run}", "--run=second"),
        ("generate", f"--from={run}", "--prompt=A", "--max_new_tokens=1"),
        ("convert", run, "~/model.pth", "--format=book"),
        ("prepare", "~/a.txt", "~/*.txt", "--out=~/corpus", "--split=ratio"),
        ("report", "sampling", "--out=~/figures"),
    ]:
        done = command(*arguments)
        assert done.code == 0, done.err
    for name in ("runs/checkpoints/second/last.ckpt", "model.pth", "corpus", "figures", "logs"):
        assert (home / name).exists(), name
    assert cache_folder() == home / "cache"
    assert "home/runs is not empty" in command("verify-resume", "--out=~/runs").err
    assert sorted(os.listdir(tmp_path)) == ["home"]


def test_home_folder_of_nobody(refused_fit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(refused_fit("--data.text=~nobody-here.txt"), "~nobody-here.txt does not exist")
    monkeypatch.delenv("GPT_LIGHTNING_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    refused(refused_fit("--data.text=verdict"), "GPT_LIGHTNING_CACHE", "no home folder")
