"""``convert``: weights from one format to another."""

import logging
import os
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from gpt_lightning.cli.generate import N_HEADS_HELP, SOURCE_HELP
from gpt_lightning.cli.options import CONFIG_HELP
from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.text_options import TextList

logger = logging.getLogger(__name__)

# a copy of the type in pretrained/convert.py, which imports torch: --help should be fast
WeightFormat = Literal["hf", "openai-tf", "lightning", "book", "gguf"]
InitAdded = Literal["mean", "normal"]  # as in pretrained/add_tokens.py
OutType = Literal["f32", "f16", "bf16", "q8_0"]  # as in pretrained/gguf.py


def run(arguments: list[str]) -> None:
    """Write the weights of SOURCE to DEST in another format.

    Formats: 'hf', a folder for Hugging Face's from_pretrained; 'openai-tf', a folder with a TensorFlow
    checkpoint; 'lightning', a .ckpt file for --init_from; 'book', a .pth file that the book's notebooks load;
    'gguf', a .gguf file for llama.cpp.

    With --average there are several SOURCEs, and DEST gets the mean of their weights.
    """
    settings = parse(_parser(), arguments)
    sources = settings.source
    if not settings.average and len(sources) > 1:
        raise ValueError(
            f"source: {len(sources)} are given; give one, or --average for the mean of their weights"
        )
    if settings.average and len(sources) < 2:
        raise ValueError("average: there is one SOURCE; give two or more, then DEST")
    if repeated := next((s for i, s in enumerate(sources) if s in sources[:i]), None):
        raise ValueError(f"average: {repeated} is given twice; give it once")
    from gpt_lightning.pretrained.convert import convert

    dest = Path(os.path.expanduser(settings.dest))
    convert(
        sources[0],
        dest,
        settings.format or _format_of(dest),
        n_heads=settings.n_heads,
        ema=settings.ema,
        average_with=sources[1:],
        added_tokens=settings.add_tokens or (),
        init_added=settings.init_added,
        outtype=settings.outtype,
    )
    logger.info(f"{dest}: written")


def _format_of(dest: Path) -> WeightFormat:
    match dest.suffix:
        case ".ckpt":
            return "lightning"
        case ".pth":
            return "book"
        case ".gguf":
            return "gguf"
    raise ValueError("format: is missing; give --format FORMAT")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gpt_lightning convert", description=run.__doc__, exit_on_error=False
    )
    add = parser.add_argument
    add("--config", action="config", help=CONFIG_HELP)
    add("source", type=str, nargs="+", help=SOURCE_HELP)
    add("dest", type=str, help="The file or folder to write. It must not exist.")
    add(
        "--format",
        type=WeightFormat | None,
        help="The format of DEST; null = lightning for a .ckpt file, book for .pth, gguf for .gguf.",
    )
    add(
        "--outtype",
        type=OutType | None,
        help="The type of the matrices in a gguf file, as in llama.cpp's convert_hf_to_gguf.py; null = f16.",
    )
    add(
        "--ema",
        action="store_true",
        help="Write the exponential moving average of the weights, which runs with model.ema_decay keep; without "
        "optimizer state.",
    )
    add(
        "--average",
        action="store_true",
        help="Write the mean of the weights of all SOURCEs, which have one architecture; without optimizer state.",
    )
    add(
        "--add_tokens",
        action=TextList,
        nargs="+",
        metavar="TOKEN",
        help="New tokens, such as '<|user|>', for hf, lightning and gguf; their ids follow those of the vocabulary.",
    )
    add(
        "--init_added",
        type=InitAdded,
        default="mean",
        help="Embeddings of new tokens: 'mean' of the others, or 'normal', drawn around it with their deviation.",
    )
    add("--n_heads", type=int | None, help=N_HEADS_HELP)
    return parser
