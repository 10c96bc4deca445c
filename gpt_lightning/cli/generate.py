"""``generate``: a prompt goes in, its continuation comes out."""

import json
import sys
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from gpt_lightning.cli.parsing import parse

if TYPE_CHECKING:
    from gpt_lightning.model.gpt import GPTModel


def run(arguments: list[str]) -> None:
    """Continue a prompt with a trained model. The text goes to stdout, remarks to stderr."""
    settings = parse(_parser(), arguments)
    if not settings["from"]:
        raise ValueError("from: is missing; give the model with --from SOURCE")
    if not settings.prompt:
        raise ValueError("prompt: is empty; give some text with --prompt")

    from gpt_lightning.pretrained.source import load_model

    device = _device(settings.device)
    model = load_model(settings["from"], device=device)
    sample = _continue(model, settings, device)
    if settings.json:
        used = {key: settings[key] for key in _SETTINGS} | {"device": device}
        print(json.dumps({**sample, "samples": [sample], "settings": used}))
    else:
        print(sample["text"])


_SETTINGS = ("from", "max_new_tokens", "temperature", "top_k", "eos_id", "seed", "special_tokens")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gpt_lightning generate", description=run.__doc__, exit_on_error=False
    )
    add = parser.add_argument
    add("--config", action="config", help="These settings from a YAML file.")
    add("--from", type=str | None, help="SOURCE: a checkpoint, or a run's folder.")
    add("--prompt", type=str | None, help="The text to continue.")
    add("--max_new_tokens", type=int, default=50, help="Tokens to add at most.")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest token; 1 draws as the model says, more is more adventurous.",
    )
    add("--top_k", type=int | None, help="Draw among the k likeliest tokens only.")
    add("--eos_id", type=int | None, default=50256, help="Stop at this token; null: at none.")
    add("--seed", type=int, default=123, help="What the draws depend on.")
    add(
        "--special_tokens",
        type=bool,
        default=False,
        help="Whether <|endoftext|> in the prompt is the token, not those characters.",
    )
    add("--device", type=str | None, help="cpu, cuda, cuda:1, …; none: the GPU if there is one.")
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser


def _continue(model: "GPTModel", settings: Namespace, device: str) -> dict[str, Any]:
    import torch

    from gpt_lightning.data.tokenizer import decode, encode_prompt
    from gpt_lightning.generation.generate import generate

    ids = encode_prompt(settings.prompt, special=settings.special_tokens)
    if not ids or max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"prompt: its tokens do not fit the model's vocabulary of {model.config.vocab_size}; "
            "give other text or another model"
        )
    if (cropped := len(ids) - model.config.context_length) > 0:
        print(
            f"gpt_lightning: prompt: {len(ids)} tokens, the model reads {model.config.context_length}; "
            f"the first {cropped} are not read",
            file=sys.stderr,
        )
    continued = generate(
        model,
        torch.tensor([ids], device=device),
        settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        eos_id=settings.eos_id,
        generator=torch.Generator(device=device).manual_seed(settings.seed),
    )
    token_ids = continued[0].tolist()
    return {"prompt": settings.prompt, "text": decode(token_ids), "token_ids": token_ids}


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"device: {name} cannot be used ({cause[:80]}); try cpu") from error
    return name
