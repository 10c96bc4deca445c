"""``generate``: prompts go in, continuations come out."""

import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.text_options import TextList, values_of
from gpt_lightning.data.unicode import clean_text, decode_text, for_stream, utf8_text

if TYPE_CHECKING:
    from gpt_lightning.model.gpt import GPTModel

logger = logging.getLogger(__name__)

DType = Literal["float32", "bfloat16", "float16"]
# what --json says that was used
_SETTINGS = (
    "from",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "eos_id",
    "stop",
    "seed",
    "num_samples",
    "allow_special_tokens",
    "dtype",
)


def run(arguments: list[str]) -> None:
    """Continue prompts with a trained model. Texts go to stdout, remarks to stderr.

    Prompts come from --prompt (repeatable), --prompt_file, or standard input.
    """
    settings = parse(_parser(), arguments)
    if not settings["from"]:
        raise ValueError("from: is missing; give the model with --from SOURCE")
    prompts = _prompts(settings, arguments)

    from gpt_lightning.generation.sampling import SamplingParams, make_generator
    from gpt_lightning.generation.text import generate_texts

    sampling = SamplingParams(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
    )
    device = resolve_device(settings.device)
    model = load(settings["from"], device, settings.dtype, settings.n_heads)
    _say_what_is_cropped(prompts, model, special=settings.allow_special_tokens)
    stream = settings.stream if settings.stream is not None else sys.stdout.isatty()
    alone = len(prompts) == settings.num_samples == 1 and not settings.json
    if settings.stream and not alone:
        raise ValueError("stream: is for one text on its own; leave out --json or the other texts")
    shown = _GrowingLine(prompts[0]) if stream and alone else None
    samples = generate_texts(
        model,
        prompts,
        settings.max_new_tokens,
        sampling,
        num_samples=settings.num_samples,
        eos_id=settings.eos_id,
        stop=settings.stop or (),
        special_tokens=settings.allow_special_tokens,
        generator=make_generator(settings.seed, device),
        on_text=shown.add if shown is not None else None,
    )
    if settings.json:
        used = {key: settings[key] for key in _SETTINGS} | {"device": device}
        entries = [asdict(sample) for sample in samples]
        # the first sample's fields stand at the top too, for the common case of one
        print(json.dumps({**entries[0], "samples": entries, "settings": used}))
    elif shown is not None:
        shown.end()
    else:
        for i, sample in enumerate(samples):
            if not alone:
                print(f"--- {i + 1} of {len(samples)}")
            print(for_stream(sample.text, sys.stdout))


class _GrowingLine:
    """One text on stdout as it grows. Nothing is shown before the first token: until then it may fail."""

    def __init__(self, prompt: str) -> None:
        self._next = prompt

    def add(self, row: int, text: str) -> None:
        print(for_stream(self._next + text, sys.stdout), end="", flush=True)
        self._next = ""

    def end(self) -> None:
        print(for_stream(self._next, sys.stdout))


def load(source: str, device: str, dtype: str | None, n_heads: int | None = None) -> "GPTModel":
    """The model of SOURCE on a device, its weights in ``dtype`` ('float32', 'bfloat16', …), to infer."""
    import torch

    from gpt_lightning.model.packed_linear import pack_weights
    from gpt_lightning.pretrained.load import load_model

    model = load_model(
        source,
        device=device,
        dtype=getattr(torch, dtype) if dtype else None,
        n_heads=n_heads,
        for_text=True,
    )
    pack_weights(model)
    return model


def resolve_device(name: str | None) -> str:
    """``name``, or without one the GPU if there is one; ``ValueError`` where it cannot be used."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        torch.Generator(device=name)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"device: {name} cannot be used ({cause[:80]}); try cpu") from error
    return name


def _prompts(settings: Namespace, arguments: list[str]) -> list[str]:
    given = [name for name in ("prompt", "prompt_file") if settings[name]]
    if len(given) == 2:  # one on the command line wins over the other in a configuration
        given = [name for name in given if values_of(f"--{name}", arguments)]
        if len(given) != 1:
            raise ValueError("prompt: both --prompt and --prompt_file are given; give one of them")
    if given == ["prompt"]:
        prompts: list[str] = settings.prompt
    elif given:
        path = Path(os.path.expanduser(settings.prompt_file))
        prompts = [_decoded(path.read_bytes(), f"prompt_file: {path}").removesuffix("\n")]
    elif sys.stdin is not None and not sys.stdin.isatty():
        prompts = [_standard_input().removesuffix("\n")]
    else:
        prompts = [""]
    if not all(prompts):
        raise ValueError(
            "prompt: is empty; give text with --prompt, --prompt_file or standard input"
        )
    return prompts


def _standard_input() -> str:
    what = "prompt: standard input"
    raw = getattr(sys.stdin, "buffer", None)
    if raw is not None:
        return _decoded(raw.read(), what)
    try:  # it is text already
        return clean_text(utf8_text(sys.stdin.read()))
    except ValueError as error:
        raise ValueError(f"{what} {error}; convert it to UTF-8") from error


def _decoded(content: bytes, what: str) -> str:
    try:
        return decode_text(content)
    except ValueError as error:
        raise ValueError(f"{what} {error}; convert it to UTF-8") from error


def _say_what_is_cropped(prompts: list[str], model: "GPTModel", *, special: bool) -> None:
    from gpt_lightning.data.tokenizer import encode_prompt

    read = model.config.context_length
    for prompt in prompts:
        if (tokens := len(encode_prompt(prompt, special=special))) > read:
            logger.warning(
                f"prompt: {tokens} tokens, the model reads {read}; "
                f"the first {tokens - read} are not read"
            )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gpt_lightning generate", description=run.__doc__, exit_on_error=False
    )
    add = parser.add_argument
    add("--config", action="config", help="These settings from a YAML file.")
    add("--from", type=str | None, help="SOURCE: a run, a checkpoint, GPT-2's files or name.")
    add("--n_heads", type=int | None, help="Attention heads, which the book's .pth does not tell.")
    add("--prompt", action=TextList, metavar="TEXT", help="The text to continue; repeatable.")
    add("--prompt_file", type=str | None, help="A UTF-8 file that is the prompt.")
    add("--max_new_tokens", type=int, default=50, help="Tokens to add at most.")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest token; 1 draws as the model says, more is more adventurous.",
    )
    add("--top_k", type=int | None, help="Draw among the k likeliest tokens only.")
    add("--top_p", type=float | None, help="Draw among the likeliest that reach this probability.")
    add(
        "--min_p",
        type=float | None,
        help="Draw among tokens this times as likely as the likeliest.",
    )
    add("--repetition_penalty", type=float, default=1.0, help="Above 1: fewer repetitions.")
    add("--num_samples", type=int, default=1, help="Continuations of each prompt.")
    add("--eos_id", type=int | None, default=50256, help="Stop at this token; null: at none.")
    add("--stop", action=TextList, metavar="TEXT", help="Stop before this string; repeatable.")
    add("--seed", type=int, default=123, help="What the draws depend on.")
    add(
        "--allow_special_tokens",
        type=bool,
        default=False,
        help="Whether <|endoftext|> in the prompt is the token, not those characters.",
    )
    add("--stream", type=bool | None, help="Show text as it grows; default: on a terminal.")
    add("--device", type=str | None, help="cpu, cuda, cuda:1, …; none: the GPU if there is one.")
    add("--dtype", type=DType | None, help="Of the weights; none: as they are stored.")
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser
