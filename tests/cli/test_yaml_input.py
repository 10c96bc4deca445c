"""YAML files: files that are not a mapping of settings, are too large or give a key twice are refused."""

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import (
    ROOT,
    SMALL,
    Command,
    assert_refused,
    mutate,
)


def test_file_that_is_not_yaml_is_refused(refused_fit: Command, tmp_path: Path) -> None:
    for content, cause in {
        b"{": "mine.yaml: line 2: is not YAML (",
        b"model:\n\tlr: 1\n": "mine.yaml: line 2: is not YAML (found character that cannot start",
        b"run: !!python/object/apply:os.system [ls]\n": "only plain values are allowed",
        b"- 1\n- 2\n": "mine.yaml: holds no settings",
        b"just words": "mine.yaml: holds no settings",
        b"": "mine.yaml: holds no settings",
        b"null\n": "mine.yaml: holds no settings",
        b"run: a\n---\nrun: b\n": "mine.yaml: line 2: begins a second document",
        b"? [a, b]\n: 1\n": "mine.yaml: line 1: a key must be one word",
        b"1: 2\n": "1: is not the name of a setting",
        b"data:\n  mixture: {1984: 1.0}\n": "data.mixture: 1984 is not text; put it in quotes",
        b"\xff\xfe\x00": "config: mine.yaml is UTF-16, not UTF-8",
        "run: Übung".encode("latin-1"): "config: mine.yaml is not UTF-8",
    }.items():
        (tmp_path / "mine.yaml").write_bytes(content)
        assert_refused(refused_fit("--config=mine.yaml"), cause)


def test_key_given_twice_is_refused(refused_fit: Command, command: Command, tmp_path: Path) -> None:
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
        assert_refused(refused_fit("--config=mine.yaml"), cause)
    assert_refused(refused_fit("--data.mixture={a: 1, a: 2}"), "a is given twice")
    assert_refused(refused_fit("--config={run: a, run: b}"), "run is given twice")
    (tmp_path / "model.yaml").write_text("lr: 1\nlr: 2\n")
    assert_refused(refused_fit("--model=model.yaml"), "lr is given twice, in lines 1 and 2")
    (tmp_path / "mine.yaml").write_text("seed: 1\nprompt: x\nseed: 2\n")
    for verb in ("generate", "prepare", "convert", "report sampling", "report sweep", "plan"):
        result = command(*verb.split(), "--config=mine.yaml")
        assert_refused(result, "mine.yaml: seed is given twice, in lines 1 and 3; keep one of them")
    # a text that looks like a mapping stays a text
    text = "--evaluation.prompt={a: 1, a: 2}"
    assert_refused(refused_fit(text, "--trainer.max_epochs=-2"), "trainer.max_epochs: -2")


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
def test_too_large_yaml_is_refused_quickly(
    refused_fit: Command, tmp_path: Path, yaml: str, cause: str
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml)
    before = time.process_time()
    assert_refused(refused_fit("--config=mine.yaml"), cause)
    assert time.process_time() - before < 1.0


def test_deeply_nested_value_on_the_command_line_is_refused(refused_fit: Command) -> None:
    assert_refused(refused_fit(f"--model.betas={'[' * 50_000}"), "model.betas: ")


@pytest.mark.parametrize(
    "group",
    ["model", "model.config", "data", "trainer", "evaluation", "checkpoint", "throughput"],
)
def test_group_without_settings_is_refused(
    refused_fit: Command, tmp_path: Path, group: str
) -> None:
    for value in ("", " [1]"):
        *outer, inner = group.split(".")
        prefix = "".join(f"{'  ' * i}{name}:\n" for i, name in enumerate(outer))
        (tmp_path / "mine.yaml").write_text(f"{prefix}{'  ' * len(outer)}{inner}:{value}\n")
        result = refused_fit("--config=mine.yaml", "--trainer.accelerator=cpu")
        assert_refused(result, f"{group}", "leave it out")
    assert_refused(refused_fit(f"--{group}=null"), f"{group}: ")


def test_mutated_yaml_gives_no_traceback(command: Command, tmp_path: Path) -> None:
    """The mutated file is valid, or refused in one line without writing a file."""
    original = (ROOT / "configs" / "quickstart.yaml").read_bytes()
    rng = random.Random("yaml")
    refused = 0
    for _ in range(60):
        (tmp_path / "mine.yaml").write_bytes(mutate(original, rng))
        result = command("fit", "--config=mine.yaml", "--print_config")
        if result.code == 0:  # the configuration was printed
            continue
        assert result.code == 2
        assert result.error.count("\n") == 1, result.err
        assert result.error.startswith("gpt_lightning: error: ")
        refused += 1
    assert refused > 10
    assert os.listdir(tmp_path) == ["mine.yaml"]


@pytest.mark.slow
def test_truncated_yaml_gives_no_traceback(command: Command, tmp_path: Path) -> None:
    """Through a real fit, because half a configuration may be valid YAML."""
    lines = (ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8").splitlines()
    contents = ["\n".join(lines[:count]) for count in range(1, len(lines))]
    contents += [f"{group}: null\n" for group in ("trainer", "checkpoint", "data", "model")]
    contents += ["[" * 3000, "trainer: 3\n", "evaluation: [1]\n"]
    refused = 0
    for i, content in enumerate(contents):
        (tmp_path / "mine.yaml").write_text(content)
        result = command("fit", "--config=mine.yaml", *SMALL, "--model.config.n_layers=1",
                       "--trainer.fast_dev_run=true", f"--run=r{i}")  # fmt: skip
        assert result.code in (0, 2)
        assert "Traceback" not in result.err
        if result.code == 2:
            assert result.error.startswith("gpt_lightning: error: ")
            refused += 1
    assert refused >= 5


def test_files_are_read_as_utf8_in_any_locale(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows reads files as cp1252 unless an encoding is named."""
    real = open

    def as_on_windows(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *rest: Any
    ) -> Any:
        if "b" not in mode and encoding is None:
            encoding = "cp1252"
        return real(file, mode, buffering, encoding, *rest)

    monkeypatch.setattr("builtins.open", as_on_windows)
    (tmp_path / "mine.yaml").write_text("evaluation: {prompt: Šárka’s 你好}", encoding="utf-8")
    for arguments in (["--config=mine.yaml"], ["--config", str(tmp_path / "mine.yaml")]):
        printed = command("fit", *arguments, "--print_config").out
        assert yaml.safe_load(printed)["evaluation"]["prompt"] == "Šárka’s 你好"
