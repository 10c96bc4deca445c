"""``generate``: prompts, options, streams and bad input."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from helpers import ENVIRONMENT, QUICKSTART, Command, assert_refused, json_of, python

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_generate_is_deterministic(fit: Command, command: Command) -> None:
    fit("--trainer.max_steps=3")
    base = ("generate", "--from=checkpoints/quickstart", "--prompt=The clock", "--max_new_tokens=8")
    greedy = command(*base)
    assert greedy.code == 0
    assert greedy.out.startswith("The clock")
    for seed in ("1", "2", "3"):
        assert command(*base, f"--seed={seed}").out == greedy.out
        assert command(*base, f"--seed={seed}", "--temperature=1", "--top_k=1").out == greedy.out
    result = command(*base, "--temperature=2", "--seed=5", "--json")
    answer = json.loads(result.out)
    assert answer["text"] != greedy.out
    assert len(answer["token_ids"]) == 2 + 8
    assert answer["settings"]["temperature"] == 2.0
    assert command(*base, "--temperature=2", "--seed=5", "--json").out == result.out


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(),
    reason="this system gives huge pages to all memory, or to none",
)
def test_large_tensors_are_in_huge_pages_unless_the_user_says_no() -> None:
    code = """
import re, sys
from pathlib import Path
from gpt_lightning.cli.main import main
assert main(["generate", "--help"]) == 0
import torch
kept = torch.ones(1 << 24)
print(re.search(r"AnonHugePages: +(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1])
"""
    own, refused = ENVIRONMENT.copy(), ENVIRONMENT | {"THP_MEM_ALLOC_ENABLE": "0"}
    own.pop("THP_MEM_ALLOC_ENABLE", None)
    huge, ordinary = (int(python("-c", code, env=env).stdout.split()[-1]) for env in (own, refused))
    assert huge - ordinary > 50_000  # kB, of 67,000


def test_long_prompt_is_cropped_and_reported(fit: Command, command: Command) -> None:
    fit("--trainer.max_steps=1")
    result = command("generate", "--from=checkpoints/quickstart", "--prompt", "the sea " * 30,
                   "--max_new_tokens=2")  # fmt: skip
    assert result.code == 0
    assert "the model reads 16" in result.err


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
def test_bad_option_of_generate_is_refused(
    command: Command, trained_run: Path, arguments: list[str], parts: list[str]
) -> None:
    assert_refused(command("generate", f"--from={trained_run}", *arguments), *parts)


def test_generate_from_a_file_that_is_not_a_model_is_refused(
    command: Command, trained_run: Path, tmp_path: Path
) -> None:
    shutil.copy(trained_run / "config.yaml", tmp_path / "config.yaml")
    assert_refused(
        command("generate", "--from=config.yaml", "--prompt=x"), "is not a torch.save file"
    )
    assert_refused(command("generate", f"--from={tmp_path}", "--prompt=x"), "last.ckpt")
    assert_refused(command("generate", "--prompt=x"), "--from SOURCE")


def test_prompts_are_not_parsed_as_markup(command: Command, trained_run: Path) -> None:
    prompt = "[/b] costs $x^^$ :smile:"
    base = ("report", "sweep", f"--from={trained_run}", f"--prompt={prompt}", "--temperatures=[1]",
            "--top_k=[5]", "--num_samples=2", "--max_new_tokens=3", "--out=grid")  # fmt: skip
    assert prompt in command(*base).out
    result = command("report", "sampling", f"--from={trained_run}", f"--prompt={prompt}",
                   "--num_samples=10", "--out=grid")  # fmt: skip
    assert (result.code, prompt in result.out) == (0, True)


def test_prompts_come_from_options_file_and_standard_input(
    command: Command, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("generate", f"--from={trained_run}", "--max_new_tokens=6", "--json")
    single = json_of(command(*base, "--prompt=The clock"))
    assert [s["text"] for s in single["samples"]] == [single["text"]]
    both = json_of(command(*base, "--prompt=The clock", "--prompt=Mr. Vane, he said"))
    assert [s["prompt"] for s in both["samples"]] == ["The clock", "Mr. Vane, he said"]
    assert both["samples"][0] == single["samples"][0]
    (tmp_path / "prompt.txt").write_text("The clock\n", encoding="utf-8")
    assert json_of(command(*base, "--prompt_file=prompt.txt"))["text"] == single["text"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("The clock\n"))
    assert json_of(command(*base))["text"] == single["text"]


@pytest.mark.parametrize(
    ("config", "arguments", "prompts"),
    [
        ("prompt: Hello", ["CONFIG"], ["Hello"]),
        ("prompt: [a, b]", ["CONFIG"], ["a", "b"]),
        ("prompt: [a, b]", ["CONFIG", "--prompt=x"], ["x"]),
        ("prompt: [a, b]", ["--prompt=x", "CONFIG", "--prompt=y"], ["x", "y"]),
        ("prompt: Hello", ["--prompt=[y]", "CONFIG"], ["[y]"]),
        ("prompt: null", ["--prompt=null", "CONFIG"], ["null"]),
        ("prompt_file: p.txt", ["--prompt=x", "CONFIG"], ["x"]),
        ("prompt: Hello", ["CONFIG", "--prompt_file=p.txt"], ["from a file"]),
        ("prompt: x\nstop: [END]", ["CONFIG"], ["x"]),
        ("prompt: x\nstop: END", ["CONFIG", "--stop", "A B"], ["x"]),
        ("prompt: x\nnum_samples: 3", ["--num_samples=1", "CONFIG"], ["x"]),
        ("\ufeffprompt: x", ["CONFIG"], ["x"]),
    ],
)
def test_texts_of_the_command_line_have_priority_over_a_config(
    command: Command,
    trained_run: Path,
    tmp_path: Path,
    config: str,
    arguments: list[str],
    prompts: list[str],
) -> None:
    """A config may hold a text or a list; the command line has priority at any position of --config."""
    (tmp_path / "mine.yaml").write_text(config, encoding="utf-8")
    (tmp_path / "p.txt").write_text("from a file", encoding="utf-8")
    options = ["--config=mine.yaml" if each == "CONFIG" else each for each in arguments]
    result = json_of(
        command("generate", f"--from={trained_run}", "--max_new_tokens=0", "--json", *options)
    )
    assert [sample["prompt"] for sample in result["samples"]] == prompts
    stop = {"stop: [END]": ["END"], "stop: END": ["A B"]}.get(config.partition("\n")[2])
    assert result["settings"]["stop"] == stop


def test_sources_of_the_command_line_have_priority_over_a_config(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("from: nowhere\nprompt: x\n", encoding="utf-8")
    result = command("report", "sizes", "--config=mine.yaml")
    assert result.err.startswith("gpt_lightning: error: nowhere: ")
    result = command("report", "sizes", "--from", "elsewhere", "--config=mine.yaml")
    assert result.err.startswith("gpt_lightning: error: elsewhere: ")


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (b"\xef\xbb\xbfThe clock\n", "BOM"),
        (b"The clock\r\n", "CRLF"),
        (b"The clock\r", "CR"),
        (b"\xef\xbb\xbfThe clock\r\n", "both"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_prompt_is_the_same_from_every_origin(
    command: Command,
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    label: str,
) -> None:
    base = ("generate", f"--from={trained_run}", "--max_new_tokens=0", "--json")
    (tmp_path / "p.txt").write_bytes(content)
    assert json_of(command(*base, "--prompt_file=p.txt"))["prompt"] == "The clock"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    assert json_of(command(*base))["prompt"] == "The clock"
    monkeypatch.setattr(sys, "stdin", io.StringIO(content.decode(), newline=""))
    assert json_of(command(*base))["prompt"] == "The clock"
    given = content.decode().rstrip("\r\n")
    assert json_of(command(*base, f"--prompt={given}"))["prompt"] == "The clock"


def test_byte_order_mark_in_a_models_config_is_ignored(
    command: Command, trained_run: Path, tmp_path: Path
) -> None:
    assert command("convert", str(trained_run), "model", "--format=hf").code == 0
    (tmp_path / "model" / "manifest.json").unlink()
    config = tmp_path / "model" / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    base = ("generate", "--prompt=The clock", "--max_new_tokens=3", "--json")
    assert (
        json_of(command(*base, "--from=model"))["text"]
        == json_of(command(*base, f"--from={trained_run}"))["text"]
    )


def test_num_samples_differ_and_streaming_prints_the_same_text(
    command: Command, trained_run: Path
) -> None:
    base = ("generate", f"--from={trained_run}", "--prompt=The clock", "--max_new_tokens=8")
    many = json_of(command(*base, "--temperature=1", "--num_samples=3", "--json"))
    assert len({s["text"] for s in many["samples"]}) == 3
    at_once, streamed = command(*base), command(*base, "--stream=true")
    assert streamed.out == at_once.out
    assert command(*base, "--num_samples=2").out.count("---") == 2


def test_stop_string_ends_the_text(command: Command, trained_run: Path) -> None:
    base = ("generate", f"--from={trained_run}", "--prompt=The clock", "--max_new_tokens=30",
            "--temperature=1", "--eos_id=null")  # fmt: skip
    text = command(*base).out.rstrip("\n")
    stop = text[len("The clock") + 12 : len("The clock") + 20]
    expected = text[: text.index(stop, len("The clock"))]
    for stream in ("false", "true"):
        assert command(*base, f"--stop={stop}", f"--stream={stream}").out.rstrip("\n") == expected


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["report", "sampling", "--tokens=[a,b]"], ["logits: 9 for 2 tokens"]),
        (["report", "sampling", "--tokens=[a,b]", "--logits=[1,2,3]"], ["logits: 3 for 2 tokens"]),
        (["report", "sampling", "--logits=[.nan,1]"], ["logits"]),
        (["report", "sampling", "--logits=[-.inf,-.inf]"], ["logits"]),
        (["report", "sampling", "--temperatures=[-1]"], ["temperature: -1"]),
        (["report", "sampling", "--top_p=[0]"], ["top_p: 0.0 is outside (0, 1]"]),
        (["report", "sampling", "--top_k=[10]"], ["top_k: 10 is outside the vocabulary"]),
        (["report", "sampling", "--num_samples=0"], ["num_samples: 0"]),
        (["report", "sampling", "--token=pasta"], ["token: pasta", "pizza"]),
        (["report", "sampling", "--prompt=x"], ["prompt: needs a model"]),
        (["report", "sampling", "--temperatures=[]"], ["temperatures: is an empty list"]),
        (["report", "sampling", "--tokens=[]"], ["logits: 9 for 0 tokens"]),
        (["report", "sampling", "--from=RUN", "--prompt=x", "--show=0"], ["show: 0"]),
        (["report", "sampling", "--from=RUN", "--prompt=x", "--token=a b"], ["is 2 tokens"]),
        (["report", "sweep", "--from=RUN", "--prompt=x", "--top_k=[]"], ["top_k: is an empty"]),
        (["generate", "--from=RUN", "--prompt=x", "--stream=true", "--json"], ["stream: is for"]),
        (["generate", "--from=RUN", "--prompt=x", "--device=meta"], ["device: meta"]),
        (
            ["generate", "--from=RUN", "--prompt=x", "--repetition_penalty=1e-45"],
            ["repetition_penalty: 1e-45"],
        ),
        (["report", "sampling", "--out=/proc/nowhere"], ["out: /proc/nowhere cannot be written"]),
        (["report", "sampling", "--from=RUN"], ["prompt: is empty"]),
        (["report", "sweep", "--prompt=x"], ["--from SOURCE"]),
        (["report", "sweep", "--from=RUN"], ["prompt: is empty"]),
        (["report", "sweep", "--from=RUN", "--prompt=x", "--num_samples=1"], ["num_samples: 1"]),
        (["report", "swep"], ["did you mean sweep?"]),
        (["generate", "--from=RUN", "--prompt=x", "--top_p=1.5"], ["top_p: 1.5 is outside (0, 1]"]),
        (["generate", "--from=RUN", "--prompt=x", "--min_p=0"], ["min_p: 0.0 is outside (0, 1]"]),
        (["generate", "--from=RUN", "--prompt=x", "--stop="], ["stop: is empty"]),
        (["generate", "--from=RUN", "--prompt=x", "--num_samples=0"], ["num_samples: 0"]),
        (["generate", "--from=RUN", "--prompt_file=nowhere"], ["nowhere: No such file"]),
        (["generate", "--from=RUN", "--prompt_file=latin"], ["prompt_file: latin is not UTF-8"]),
        (
            ["generate", "--from=RUN", "--prompt_file=utf-16"],
            ["prompt_file: utf-16 is UTF-16, not"],
        ),
        (["generate", "--from=RUN", "--config=utf-16"], ["config: utf-16 is UTF-16, not UTF-8"]),
        (["generate", "--from=RUN", "--config=latin"], ["config: latin is not UTF-8 (byte 0"]),
        (
            ["generate", "--from=RUN", "--config=number.yaml"],
            ["prompt: 3 is not text; put it in quotes"],
        ),
        (
            ["generate", "--from=RUN", "--prompt=caf\udce9"],
            ["prompt: is not valid UTF-8 (byte 0xe9 at character 3)"],
        ),
        (
            ["generate", "--from=RUN", "--prompt=x", "--stop=\ud800"],
            ["stop: is not valid UTF-8 (\\ud800"],
        ),
        (
            ["report", "sweep", "--from=RUN", "--prompt=caf\udce9"],
            ["prompt: is not valid UTF-8 (byte 0xe9"],
        ),
        (
            ["report", "sizes", "--from=RUN", "--prompt=\udc00"],
            ["prompt: is not valid UTF-8 (\\udc00"],
        ),
        (["report", "sampling", "--token=caf\udce9"], ["token: is not valid UTF-8 (byte 0xe9"]),
        (
            ["report", "sampling", "--tokens=[caf\udce9]", "--logits=[1]"],
            ["tokens: is not valid UTF-8"],
        ),
        (
            ["fit", QUICKSTART, "--evaluation.prompt=caf\udce9"],
            ["evaluation.prompt: is not valid UTF-8 (byte 0xe9"],
        ),
        (["generate", "--from=RUN", "--prompt=x", "--prompt_file=latin"], ["give one of them"]),
    ],
    ids=lambda value: " ".join(value[:4]),
)
def test_bad_input_is_refused_in_one_line(
    command: Command, trained_run: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    (tmp_path / "latin").write_bytes("Übermut".encode("latin-1"))
    (tmp_path / "utf-16").write_bytes("Übermut".encode("utf-16"))
    (tmp_path / "number.yaml").write_bytes(b"prompt: 3")
    result = command(*[argument.replace("RUN", str(trained_run)) for argument in arguments])
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("gpt_lightning: error: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err
    assert {path.name for path in tmp_path.iterdir()} == {"latin", "utf-16", "number.yaml"}
