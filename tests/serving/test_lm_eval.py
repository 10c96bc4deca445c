"""lm-evaluation-harness judges a model through ``serve`` as it judges our export of the same model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from servers import running_server, write_tiny_model

pytest.importorskip("lm_eval", reason="needs the extra harness")
pytestmark = pytest.mark.slow

CONTEXT = 64
NOUNS = ["house", "dog", "river", "garden", "picture", "man", "woman", "story", "night", "day"]
LONG = "{{q}} a {{choices[1]}}, " + "and so on and on until the context of the model is full, " * 9
TASKS = {
    "colors": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": LONG,
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "stories": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small tasks with local data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": f"The {noun} is", "choices": [" red", " large and old", " a thing", " no"], "gold": n % 4}
        for n, noun in enumerate(NOUNS)
    ]  # fmt: skip
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, task in TASKS.items():
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        content = json.dumps({"task": name, **source, **task})  # JSON is YAML
        (folder / f"{name}.yaml").write_text(content, encoding="utf-8")
    return folder


def judged(tasks: Path, out: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and answers of all tasks."""
    result = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments, "--tasks", ",".join(TASKS), "--include_path", str(tasks),
         "--output_path", str(out), "--log_samples"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "home"),
                          "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (file,) = out.glob("*/results_*.json")
    samples = {
        name: [json.loads(line) for line in next(out.glob(f"*/samples_{name}_*.jsonl")).read_text().splitlines()]
        for name in TASKS
    }  # fmt: skip
    return json.loads(file.read_text())["results"], samples


def test_harness_gives_the_results_of_our_export(tasks: Path, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "tiny", context_length=CONTEXT)
    with running_server("serve", "--from", str(source)) as server:
        model = (
            f"model=tiny,base_url={server.url}/v1/completions,tokenizer={source},max_length={CONTEXT},"
            "num_concurrent=4,tokenized_requests=True"
        )
        served, served_samples = judged(
            tasks, tmp_path / "served", "--model", "local-completions", "--model_args", model
        )
    # the harness keeps two positions of an API free, so its windows of a long text are shorter there
    model = f"pretrained={source},dtype=float32,max_length={CONTEXT - 2}"
    expected, expected_samples = judged(
        tasks, tmp_path / "hf", "--model", "hf", "--device", "cpu", "--model_args", model
    )
    for task in TASKS:
        numbers = {k: v for k, v in expected[task].items() if isinstance(v, float)}
        assert numbers
        for name, value in numbers.items():
            assert served[task][name] == pytest.approx(value, rel=1e-4, abs=1e-4), (task, name)
    for ours, theirs in zip(served_samples["colors"], expected_samples["colors"], strict=True):
        for (logprob, is_greedy), (other, other_is_greedy) in zip(
            ours["filtered_resps"], theirs["filtered_resps"], strict=True
        ):
            assert float(logprob) == pytest.approx(float(other), abs=1e-4)
            assert is_greedy == other_is_greedy
    answers = [s["filtered_resps"] for s in served_samples["stories"]]
    assert answers == [s["filtered_resps"] for s in expected_samples["stories"]]
