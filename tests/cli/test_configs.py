"""The shipped configurations: parsed, documented, composed, and the recipe's numbers."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from helpers import PRETRAIN, ROOT, SCALING, SMALL, Command, assert_refused, plan_as_json


def test_each_config_parses_and_names_its_command(command: Command) -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        commands = [
            line for line in path.read_text(encoding="utf-8").splitlines() if " fit " in line
        ]
        assert any(f"--config configs/{path.name}" in line for line in commands)
        yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_config_is_found_by_name_where_no_clone_is(command: Command, tmp_path: Path) -> None:
    """A path that exists has priority over a name."""
    for config in ("gpt2", "gpt2.yaml", "configs/gpt2.yaml"):
        for arguments in ([f"--config={config}"], ["--config", config], ["-c", config]):
            assert plan_as_json(command, *arguments)["parameters"] == 124_439_808
    (tmp_path / "configs").mkdir()
    own = "data: {text: sample}\nmodel: {config: {emb_dim: 12}}\n"
    (tmp_path / "configs" / "gpt2.yaml").write_text(own)
    assert plan_as_json(command, "--config=configs/gpt2.yaml")["parameters"] < 124_439_808
    assert plan_as_json(command, "--config=gpt2")["parameters"] == 124_439_808
    assert_refused(command("plan", "--config=gtp2"), "gtp2 does not exist; did you mean")
    assert_refused(command("plan", "--config=zzz"), "zzz does not exist; give a YAML file")
    (tmp_path / "gpt2").mkdir()  # a folder is no configuration
    assert plan_as_json(command, "--config=gpt2")["parameters"] == 124_439_808
    assert_refused(command("generate", "--config=gpt2"), "gpt2 is a folder")  # has no settings


def test_configs_are_listed_and_copied(command: Command, tmp_path: Path) -> None:
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    lines = command("configs", "list").out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == names
    assert command("configs", "copy", "quickstart").code == 0
    copy = tmp_path / "quickstart.yaml"
    assert copy.read_bytes() == (ROOT / "configs" / "quickstart.yaml").read_bytes()
    copy.write_text("run: mine\n")
    assert_refused(command("configs", "copy", "quickstart"), "quickstart.yaml: exists")
    assert copy.read_text() == "run: mine\n"
    for arguments, cause in {
        "copy quickstrat": "quickstrat: is not a configuration; did you mean quickstart?",
        "copy": "configs copy: needs a name; give one of 16gb, appendix-d, ddp, ",
        "list ddp": "configs list: ddp is one argument too many",
        "cpoy ddp": "cpoy is unknown; did you mean copy?",
    }.items():
        assert_refused(command("configs", *arguments.split()), cause)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quickstart.yaml"]


def test_each_setting_of_the_recipe_has_a_source() -> None:
    text = PRETRAIN.read_text(encoding="utf-8")
    settings = [line for line in text.splitlines() if line.startswith("  ") and ": " in line]
    sources = r"\[(GPT-2|GPT-3|nanoGPT|llm\.c|Chinchilla|modded)\]|GPT-2's released|375 million|the complete run|our value|no limit|the output of"
    for line in settings:
        assert re.search(sources, line.partition("#")[2]), line


@pytest.mark.parametrize(("devices", "micro_batches"), [(1, 32), (8, 4), (32, 1)])
def test_recipe_has_the_same_global_batch_on_any_number_of_devices(
    command: Command, devices: int, micro_batches: int
) -> None:
    found = plan_as_json(command, f"--config={PRETRAIN}", "--gpu=H100", f"--devices={devices}")
    assert found["parameters"] == 124_439_808
    assert found["tokens_per_step"] == 524_288
    assert found["settings"]["micro_batches"] == micro_batches
    assert found["fits"]


def test_header_of_the_recipe_equals_the_plan(command: Command) -> None:
    header = PRETRAIN.read_text(encoding="utf-8").partition("\nrun:")[0]
    errors = re.search(
        r"Time: (\d+) hours on one H100, which `plan` estimates at 40 % of its peak",
        header,
    )
    memory = re.search(
        r"estimates ([\d.]+) GB of memory on one device and\n# ([\d.]+) GB on each of eight", header
    )
    assert errors is not None
    assert memory is not None
    one, eight = (
        plan_as_json(command, f"--config={PRETRAIN}", "--gpu=H100", f"--devices={devices}")
        for devices in (1, 8)
    )
    assert memory.groups() == (f"{one['total'] / 1e9:.1f}", f"{eight['total'] / 1e9:.1f}")
    assert errors.groups() == (f"{one['hours']:.0f}",)
    named = set(re.findall(r"\[([\w. -]+)\]", header))
    assert named == set(re.findall(r"^#   \[([\w. -]+)\]", header, re.M))


def test_recipe_runs_on_one_device(fit: Command, command: Command) -> None:
    """With a small model and text."""
    result = command(
        "fit", f"--config={PRETRAIN}", *SMALL, "--trainer.max_steps=2", "--model.warmup_steps=1",
        "--model.compile=false", "--data.global_batch_tokens=128",
        "--data.num_workers=0", "--evaluation.eval_freq=1",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert (Path("checkpoints/pretrain-124M") / "last.ckpt").exists()


@pytest.mark.parametrize("line", re.findall(r"^python -m gpt_lightning (.+)$", SCALING, re.M))
def test_commands_in_the_docs_parse(
    command: Command, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert command(*shlex.split(line), "--print_config").code == 0


def test_overlays_compose_with_each_config(command: Command) -> None:
    for base in ("quickstart", "verdict", "gpt2"):
        for name in ("ddp", "fsdp", "16gb"):
            configs = [f"--config={ROOT}/configs/{each}.yaml" for each in (base, name)]
            result = command("fit", *configs, "--print_config")
            assert result.code == 0
            printed = result.out
            assert f"run: {base}" in printed
            assert {"ddp": "DDPStrategy", "fsdp": "FSDP2Strategy", "16gb": "16-mixed"}[
                name
            ] in printed
