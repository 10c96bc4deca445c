"""``convert``: weights from one form to another."""

import logging
import os
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from gpt_lightning.cli.parsing import parse

logger = logging.getLogger(__name__)

# as in pretrained/convert.py, which imports torch: --help does not wait for it
WeightFormat = Literal["hf", "openai-tf", "lightning", "book"]


def run(arguments: list[str]) -> None:
    """Write SOURCE's weights to DEST in another form.

    'hf' is a folder for Hugging Face's from_pretrained, 'openai-tf' a folder with a TensorFlow checkpoint,
    'lightning' a .ckpt file of ours, 'book' a .pth file as the book's notebooks save and load it.
    """
    settings = parse(_parser(), arguments)
    from gpt_lightning.pretrained.convert import convert

    dest = Path(os.path.expanduser(settings.dest))
    convert(settings.source, dest, settings.format, n_heads=settings.n_heads)
    logger.info(f"{dest}: written")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gpt_lightning convert", description=run.__doc__, exit_on_error=False
    )
    add = parser.add_argument
    add("--config", action="config", help="These settings from a YAML file.")
    add(
        "source", type=str, help="A run, a checkpoint, a .pth, a folder with GPT-2's files, a name."
    )
    add("dest", type=str, help="What to write; it must not exist.")
    add("--format", type=WeightFormat, required=True, help="The form to write.")
    add("--n_heads", type=int | None, help="Attention heads, which the book's .pth does not tell.")
    return parser
