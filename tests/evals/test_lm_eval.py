"""``evaluate`` and lm-evaluation-harness on the same export: the tasks as the harness defines them, with local files."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import Command, json_of
from plain_likelihood import WIKITEXT
from servers import write_tiny_model

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra harness")
pytestmark = pytest.mark.slow

CONTEXT = 96
# our task → folder and file of the harness's definition, and the split that it judges
DEFINITIONS = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "lambada": ("lambada/lambada_openai.yaml", "test"),
    "wikitext": ("wikitext/wikitext.yaml", "test"),
}


def write_task(folder: Path, task: str, data: Path) -> None:
    """The harness's definition of a task under the name ``local_TASK``, with a local file as its data."""
    name, split = DEFINITIONS[task]
    definition = Path(lm_eval.__file__).parent / "tasks" / name
    for file in definition.parent.glob("*.py"):
        shutil.copy(file, folder)
    kept = [
        line
        for line in definition.read_text(encoding="utf-8").splitlines()
        if not re.match("task:|dataset_|training_split:|validation_split:|test_split:", line)
    ]
    files = json.dumps({"data_files": {split: str(data)}})
    own = [f"task: local_{task}", "dataset_path: json", f"dataset_kwargs: {files}", f"{split}_split: {split}"]  # fmt: skip
    (folder / f"{task}.yaml").write_text("\n".join([*own, *kept]), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def local_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Task → its file for ``evaluate``, and for the harness."""
    nouns = ["house", "dog", "river", "garden", "picture", "man", "woman", "story", "night", "day"]
    choices = [
        {
            "ind": n,
            "activity_label": f"Seeing the {noun}",
            "ctx_a": f"[header] How to see a {noun} [title] Go there. " + "It is far. " * (n * 4),
            "ctx_b": f"The {noun} iN a  street",
            "endings": ["is  red.", "was [step] large and old.", "has gone away, as ever.", "no"],
            "label": str(n % 4),
        }
        for n, noun in enumerate(nouns)
    ]
    texts = [{"text": f"The {n}, she said, was a {n}, and so it was with every {n}"} for n in nouns]
    if WIKITEXT.exists():
        pages = WIKITEXT.read_text(encoding="utf-8").split("\n = ")[1]
        page = f" = {pages[:3000]}\n"
    else:
        page = ' = A page = \n \n It has 1 @,@ 000 words , " all " ( short ) . \n' * 30
    wiki = folder / "wiki.txt"
    wiki.write_text(page, encoding="utf-8")
    choice_file = write_lines(folder / "choices.jsonl", choices)
    text_file = write_lines(folder / "texts.jsonl", texts)  # type: ignore[arg-type]
    return {
        "hellaswag": (choice_file, choice_file),
        "lambada": (text_file, text_file),
        "wikitext": (wiki, write_lines(folder / "pages.jsonl", [{"page": page}])),
    }


def test_results_are_those_of_the_harness(command: Command, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "tiny", context_length=CONTEXT)
    files = local_files(tmp_path)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for task, (_, data) in files.items():
        write_task(tasks, task, data)
    result = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu",
         "--model_args", f"pretrained={source},dtype=float32", "--include_path", str(tasks),
         "--tasks", ",".join(f"local_{task}" for task in files), "--output_path", str(tmp_path / "out")],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"),
                          "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (file,) = (tmp_path / "out").glob("*/results_*.json")
    theirs = json.loads(file.read_text(encoding="utf-8"))["results"]
    compared = 0
    for task, (data, _) in files.items():
        ours = json_of(
            command("evaluate", f"--from={source}", f"--task={task}", f"--file={data}", "--json")
        )
        for name, value in theirs[f"local_{task}"].items():
            metric = name.removesuffix(",none")
            if isinstance(value, float) and metric in ours:
                assert ours[metric] == pytest.approx(value, rel=1e-4), (task, metric)
                compared += 1
        if task == "hellaswag":
            assert ours["cropped"] > 0
    assert compared >= 7  # acc, acc_norm; acc, perplexity; three of wikitext
