"""Unknown names: the nearest setting, configuration or command is suggested."""

from pathlib import Path

import pytest

from helpers import Command, assert_refused


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
def test_nearest_setting_is_suggested(command: Command, arguments: str, near: str) -> None:
    result = command(*(word.replace("~", " ") for word in arguments.split()))
    assert_refused(result, "is not a setting", f"did you mean {near}?")


def test_nearest_configuration_is_suggested(command: Command, tmp_path: Path) -> None:
    for name in ("configs/quickstart.yaml", "configs/verdict.yaml", "other/notes.md", "mine.yml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("run: x\n")
    for given, near in {
        "config/quickstart.yaml": "configs/quickstart.yaml",
        "configs/quikstart.yaml": "configs/quickstart.yaml",
        "quickstrt": "configs/quickstart.yaml",
        "verdict.yml": "configs/verdict.yaml",
        "min.yml": "mine.yml",
    }.items():
        for verb in ("fit", "generate"):
            result = command(verb, "--config", given)
            assert_refused(result, f"config: {given} does not exist; did you mean {near}?")
    assert_refused(command("fit", "-c", "zzz"), "config: zzz does not exist; give a YAML file")
    assert_refused(
        command("fit", "--config=configs"), "config: configs is a folder; give a YAML file"
    )


def test_nearest_setting_is_suggested_for_a_yaml_key(refused_fit: Command, tmp_path: Path) -> None:
    for text, near in [
        ("model:\n  config:\n    emb_dimm: 8\n", "did you mean model.config.emb_dim?"),
        ("evaluation:\n  eval_frequ: 8\n", "did you mean evaluation.eval_freq?"),
        ("modell:\n  lr: 8\n", "did you mean model.lr?"),
        ("seed_everythin: 8\n", "did you mean seed_everything?"),
    ]:
        (tmp_path / "mine.yaml").write_text(text)
        assert_refused(refused_fit("--config=mine.yaml"), near)


def test_nearest_command_is_suggested(command: Command) -> None:
    assert_refused(command("trian"), "trian: is not a command")
    assert_refused(command("fitt"), "did you mean fit?")
