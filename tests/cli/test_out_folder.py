"""``--out``: a command that refuses its input leaves no new file or folder."""

import os
import shlex
from pathlib import Path

import pytest

from helpers import ROOT, SMALL, Command

VERIFY_RESUME = f"verify-resume --config={ROOT}/configs/quickstart.yaml {shlex.join(SMALL)}"


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("report sizes --prompt=x --from nowhere --out=a/b", "nowhere: does not exist"),
        ("report sizes --prompt=x --from nowhere --device=no --out=a/b", "device: no cannot be"),
        ("report sweep --prompt=x --from=nowhere --out=a/b", "nowhere: does not exist"),
        ("report sweep --prompt=x --from=nowhere --temperatures=[-1] --out=a/b", "temperature: -1"),
        ("report sampling --token=lobster --out=a/b", "token: lobster is not a token"),
        ("report sampling --prompt=x --from=nowhere --out=a/b", "nowhere: does not exist"),
        ("report sampling --num_samples=0 --out=a/b", "num_samples: 0"),
        (f"report sampling --out=a/{'x' * 300}", "cannot be written (File name too long)"),
        ("prepare nowhere.txt --out=a/b", "nowhere.txt: does not exist"),
        ("prepare broken.jsonl --out=a/b", "broken.jsonl"),
        ("prepare short.txt --out=a/b", "short.txt is one document"),
        ("convert nowhere a --format=hf", "nowhere: does not exist"),
        ("convert broken.jsonl a.ckpt --format=lightning", "broken.jsonl"),
        ("download gpt2-1M --out=a/b", "gpt2-1M: is neither a size"),
        (f"{VERIFY_RESUME} --model.lrr=1 --out=a/b", "model.lrr: is not a setting"),
        (f"{VERIFY_RESUME} --ckpt_path=last --out=a/b", "ckpt_path: verify-resume trains new runs"),
        (f"{VERIFY_RESUME} --trainer.devices=0 --out=a/b", "trainer.devices"),
        (f"{VERIFY_RESUME} --evaluation.top_k=0 --out=a/b", "top_k"),
        ("plan --data.text=sample --mfu=2", "mfu: 2.0 is not a share"),
    ],
)
def test_refused_input_leaves_no_new_file(
    command: Command, tmp_path: Path, line: str, cause: str
) -> None:
    (tmp_path / "broken.jsonl").write_text("not JSON")
    (tmp_path / "short.txt").write_text("one document")
    before = sorted(os.listdir(tmp_path))
    done = command(*shlex.split(line))
    assert done.code in (1, 2), done.out
    assert cause in done.err.splitlines()[-1]
    assert sorted(os.listdir(tmp_path)) == before
