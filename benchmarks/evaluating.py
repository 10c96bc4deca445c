"""HellaSwag, compared with lm-evaluation-harness: python benchmarks/evaluating.py [--file FILE] [--limit 64] [--tiny]

A model of 6 blocks of width 256 with random weights and GPT-2's vocabulary, in float32. Both sides get the same texts,
tokenize them and compute the log-likelihood of each ending. The harness reads the Hugging Face export of the model, with
batches of 1, 8 and 16; the fastest of them counts. The backends take turns. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import torch
from machine import at_least, at_most, description, interleaved, ratio

from gpt_lightning import GPTConfig, GPTModel, save_model
from gpt_lightning.cli.generate import load_for_inference
from gpt_lightning.evals.likelihood import log_likelihoods
from gpt_lightning.evals.multiple_choice import choice_requests, chosen_endings
from gpt_lightning.evals.task_files import ChoiceExample, read_choices

HELLASWAG = Path(__file__).parents[2] / "shared" / "data" / "hellaswag_val.txt.bz2"
BATCHES = (1, 8, 16)
OUR_BATCH = 32  # the command's default

Scores = list[list[float]]


def ours(folder: str, examples: list[ChoiceExample]) -> Callable[[], Scores]:
    model, tokenizer = load_for_inference(folder, "cpu", None)

    def score() -> Scores:
        requests = choice_requests(tokenizer, examples)
        answers = log_likelihoods(model, requests, OUR_BATCH)
        return [[each.logprob for each in answer] for answer in answers]

    return score


def harness(folder: str, examples: list[ChoiceExample], batch_size: int) -> Callable[[], Scores]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=batch_size)
    requests = [
        Instance("loglikelihood", {}, (example.context, f" {ending}"), 0)
        for example in examples
        for ending in example.endings
    ]

    def score() -> Scores:
        answers = iter(lm.loglikelihood(requests, disable_tqdm=True))
        return [[next(answers)[0] for _ in example.endings] for example in examples]

    return score


def right(examples: list[ChoiceExample], scores: Scores) -> list[int]:
    """Number of right answers, plain and per character."""
    pairs = list(zip(examples, scores, strict=True))
    return [sum(chosen_endings(e, s)[i] == e.label for e, s in pairs) for i in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", default=str(HELLASWAG), help="HellaSwag's file")
    parser.add_argument("--limit", type=int, default=64, help="number of examples")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a toy model and four made examples")
    options = parser.parse_args()
    sizes = {"context_length": 256, "emb_dim": 256, "n_heads": 4, "n_layers": 6}
    if options.tiny:
        sizes |= {"emb_dim": 16, "n_heads": 2, "n_layers": 2}
        examples = [
            ChoiceExample(f"The {noun} is", ("red.", "large and old.", "a thing."), 1)
            for noun in ("house", "river", "old garden", "picture")
        ]
        options.repeats = 1
    else:
        examples = read_choices(options.file)[: options.limit]
    torch.manual_seed(1)
    model = GPTModel(GPTConfig(**sizes, drop_rate=0.0, qkv_bias=True, tied_embeddings=True))

    with tempfile.TemporaryDirectory() as temporary:
        folder = f"{temporary}/model"
        save_model(model, folder)
        functions: dict[str, Callable[[], Scores]] = {"ours": ours(folder, examples)}
        functions |= {f"harness, batch {b}": harness(folder, examples, b) for b in BATCHES}
        scores = {name: function() for name, function in functions.items()}
        seconds = interleaved({n: partial(f) for n, f in functions.items()}, options.repeats)

    result: dict[str, Any] = {}
    for name, each in seconds.items():
        rates = [len(examples) / s for s in each]
        result[name] = {
            "examples_per_second": round(statistics.median(rates), 2),
            "range": [round(min(rates), 2), round(max(rates), 2)],
            "right": right(examples, scores[name]),
        }
        print(f"{name:18}", result[name], flush=True)
    peers = [name for name in functions if name != "ours"]
    fastest = min(peers, key=lambda name: statistics.median(seconds[name]))
    difference = max(
        abs(a - b)
        for one, other in zip(scores["ours"], scores[fastest], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    targets = [
        at_least(f"speed, {fastest} = 1", ratio(seconds[fastest], seconds["ours"]), 3.0),
        at_most("largest difference of a log-likelihood", difference, 1e-3),
    ]
    settings = {**sizes, "examples": len(examples), "our_batch": OUR_BATCH}
    print(
        json.dumps(
            {
                "machine": description("transformers", "lm_eval"),
                "settings": settings,
                "measured": result,
                "targets": targets,
            }
        )
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
