"""``generate``: continue prompts with a trained model."""

import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from gpt_lightning.cli.options import CONFIG_HELP
from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.text_options import TextList, values_of
from gpt_lightning.data.unicode import clean_text, decode_text, for_stream, utf8_text

if TYPE_CHECKING:
    from gpt_lightning.data.tokenizer import Tokenizer
    from gpt_lightning.model.gpt import GPTModel

logger = logging.getLogger(__name__)

DType = Literal["float32", "bfloat16", "float16", "int8", "int4"]
# help texts that reports share
SOURCE_HELP = (
    "SOURCE is a run's folder, a checkpoint, a .pth file, a folder with GPT-2's files, or a downloaded "
    "model's name such as gpt2-124M."
)
N_HEADS_HELP = "Number of attention heads, only for a .pth of the book, which does not contain it."
SEED_HELP = "Seed for sampling: the same seed gives the same samples."
DEVICE_HELP = "cpu, cuda, cuda:1, mps, …; null = CUDA's GPU if there is one, else the CPU."
DTYPE_HELP = (
    "Of the weights: float32, bfloat16, float16, int8 or int4 (fast on a CPU, less exact); "
    "null = as stored."
)

# the settings in the output of --json
_JSON_SETTINGS = (
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
    "speculate",
)


def run(arguments: list[str]) -> None:
    """Continue prompts with a trained model. Texts go to stdout, messages to stderr.

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
    model, tokenizer = load_for_inference(
        settings["from"],
        device,
        settings.dtype,
        settings.n_heads,
        rows=None if settings.speculate else len(prompts) * settings.num_samples,
    )
    _warn_if_cropped(prompts, model, tokenizer, special=settings.allow_special_tokens)
    if settings.eos_id == "end_of_text":
        settings.eos_id = tokenizer.end_of_text_id
    stream = settings.stream if settings.stream is not None else sys.stdout.isatty()
    is_single = len(prompts) == settings.num_samples == 1 and not settings.json
    if settings.stream and not is_single:
        raise ValueError("stream: is for a single text; leave out --json or the other texts")
    streamed = _StreamedText(prompts[0]) if stream and is_single else None
    samples = generate_texts(
        model,
        prompts,
        settings.max_new_tokens,
        sampling,
        num_samples=settings.num_samples,
        tokenizer=tokenizer,
        eos_id=settings.eos_id,
        stop=settings.stop or (),
        special_tokens=settings.allow_special_tokens,
        generator=make_generator(settings.seed, device),
        on_text=streamed.add if streamed is not None else None,
        speculate=settings.speculate,
    )
    if settings.json:
        used_settings = {key: settings[key] for key in _JSON_SETTINGS} | {"device": device}
        entries = [asdict(sample) for sample in samples]
        # the first sample's fields are also at the top level, for the common case of one sample
        print(json.dumps({**entries[0], "samples": entries, "settings": used_settings}))
    elif streamed is not None:
        streamed.end()
    else:
        for i, sample in enumerate(samples):
            if not is_single:
                print(f"--- {i + 1} of {len(samples)}")
            print(for_stream(sample.text, sys.stdout))


class _StreamedText:
    """One text that is printed token by token. The prompt waits for the first token: until then it may fail."""

    def __init__(self, prompt: str) -> None:
        self._pending = prompt

    def add(self, row: int, text: str) -> None:
        print(for_stream(self._pending + text, sys.stdout), end="", flush=True)
        self._pending = ""

    def end(self) -> None:
        print(for_stream(self._pending, sys.stdout))


def load_for_inference(
    source: str,
    device: str,
    dtype: str | None,
    n_heads: int | None = None,
    *,
    rows: int | None = None,
) -> tuple["GPTModel", "Tokenizer"]:
    """The model of ``source`` on a device, with weights in ``dtype`` ('float32', …), and its tokenizer.

    Args:
        rows: Number of texts that are decoded at once, ``None`` if it varies.
    """
    import torch

    from gpt_lightning.pretrained.load import load_for_text

    return load_for_text(
        source,
        device=device,
        dtype=getattr(torch, dtype) if dtype else None,
        n_heads=n_heads,
        rows=rows,
    )


def resolve_device(name: str | None) -> str:
    """``name``; if it is ``None``, CUDA's GPU if there is one. ``ValueError`` if the device cannot be used.

    MPS is not chosen without a name: nobody has compared its speed and its texts with the CPU's.
    """
    import torch

    from gpt_lightning.model.hardware import MPS_UNTRIED

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        torch.Generator(device=name)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"device: {name} cannot be used ({cause[:80]}); try cpu") from error
    if torch.device(name).type == "mps":
        logger.warning(MPS_UNTRIED)
    return name


def _prompts(settings: Namespace, arguments: list[str]) -> list[str]:
    """The prompts of --prompt, --prompt_file or standard input."""
    given = [name for name in ("prompt", "prompt_file") if settings[name]]
    if len(given) == 2:  # the command line has priority over a configuration
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
    name = "prompt: standard input"
    raw = getattr(sys.stdin, "buffer", None)
    if raw is not None:
        return _decoded(raw.read(), name)
    try:  # a stream of text, in a test or a notebook
        return clean_text(utf8_text(sys.stdin.read()))
    except ValueError as error:
        raise ValueError(f"{name} {error}; convert it to UTF-8") from error


def _decoded(content: bytes, name: str) -> str:
    try:
        return decode_text(content)
    except ValueError as error:
        raise ValueError(f"{name} {error}; convert it to UTF-8") from error


def _warn_if_cropped(
    prompts: list[str], model: "GPTModel", tokenizer: "Tokenizer", *, special: bool
) -> None:
    max_tokens = model.config.context_length
    for prompt in prompts:
        if (tokens := len(tokenizer.encode_prompt(prompt, special=special))) > max_tokens:
            logger.warning(
                f"prompt: has {tokens} tokens, the model reads {max_tokens}; "
                f"the first {tokens - max_tokens} are not read"
            )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gpt_lightning generate", description=run.__doc__, exit_on_error=False
    )
    add = parser.add_argument
    add("--config", action="config", help=CONFIG_HELP)
    add("--from", type=str | None, metavar="SOURCE", help=f"The model. {SOURCE_HELP}")
    add("--n_heads", type=int | None, help=N_HEADS_HELP)
    add("--prompt", action=TextList, metavar="TEXT", help="A text to continue; repeatable.")
    add("--prompt_file", type=str | None, metavar="FILE", help="A UTF-8 file with the prompt.")
    add("--max_new_tokens", type=int, default=50, help="Maximum number of new tokens.")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0 = greedy; 1 = the model's distribution; > 1 flattens it.",
    )
    add("--top_k", type=int | None, help="Sample from the k most likely tokens; null = all.")
    add(
        "--top_p",
        type=float | None,
        help="Sample from the fewest likely tokens with a total probability of p, 0 < p <= 1; null = all.",
    )
    add(
        "--min_p",
        type=float | None,
        help="Sample from the tokens with at least p times the probability of the most likely one, "
        "0 < p <= 1; null = all.",
    )
    add(
        "--repetition_penalty",
        type=float,
        default=1.0,
        help="1 = off; > 1 makes tokens that the text already contains less likely.",
    )
    add("--num_samples", type=int, default=1, help="Number of continuations of each prompt.")
    add(
        "--eos_id",
        type=int | Literal["end_of_text"] | None,
        default="end_of_text",
        help="Stop at this token id; end_of_text = the tokenizer's <|endoftext|>, GPT-2's is 50256; null = never.",
    )
    add("--stop", action=TextList, metavar="TEXT", help="Stop before this text; repeatable.")
    add("--seed", type=int, default=123, help=SEED_HELP)
    add(
        "--allow_special_tokens",
        type=bool,
        default=False,
        help="true = <|endoftext|> in the prompt is one special token; false = it is plain text.",
    )
    add(
        "--speculate",
        type=Literal["ngram"] | None,
        help="ngram = guess tokens where the text repeats itself, and compute several at once: the same text, sooner; "
        "for one text. null = off.",
    )
    add(
        "--stream",
        type=bool | None,
        help="Print each token immediately; null = only on a terminal.",
    )
    add("--device", type=str | None, help=DEVICE_HELP)
    add("--dtype", type=DType | None, help=DTYPE_HELP)
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser
