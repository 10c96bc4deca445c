"""``train-tokenizer``: a vocabulary of one's own."""

import json
import logging
import os
import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from gpt_lightning.cli.console import BytesProgress
from gpt_lightning.cli.options import CONFIG_HELP
from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.text_options import TextList
from gpt_lightning.data.unicode import for_stream

logger = logging.getLogger(__name__)


def run(arguments: list[str]) -> None:
    """Train a byte-level BPE vocabulary and write it to DIR/tokenizer.json, for --data.tokenizer and prepare.

    INPUT is what prepare reads. The same texts give the same file.
    """
    settings = parse(_parser(), arguments)
    from gpt_lightning.data.prepare.train_tokenizer import train_tokenizer

    out = Path(os.path.expanduser(settings.out))
    with BytesProgress("reading") as progress:
        trained = train_tokenizer(
            settings.inputs,
            out,
            settings.vocab_size,
            field=settings.field,
            on_progress=progress.advance,
        )
    if trained.vocab_size < settings.vocab_size:
        logger.warning(
            f"vocab_size: the text has pairs for {trained.vocab_size} tokens only; give more text for "
            f"{settings.vocab_size}"
        )
    result = {"folder": str(out), "vocab_size": trained.vocab_size, **trained.checksums}
    text = f"{out}: {trained.vocab_size:,} tokens, SHA-256 {trained.checksums['sha256']}"
    print(json.dumps(result) if settings.json else for_stream(text, sys.stdout))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gpt_lightning train-tokenizer", description=run.__doc__, exit_on_error=False
    )
    add = parser.add_argument
    add("--config", action="config", help=CONFIG_HELP)
    add("inputs", action=TextList, nargs="+", metavar="INPUT", help="Files, folders, globs.")
    add("--vocab_size", type=int, required=True, help="Number of tokens, 257 or more.")
    add("--out", type=str, required=True, metavar="DIR", help="The folder of tokenizer.json.")
    add("--field", type=str, default="text", help="The field of a row that holds its text.")
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser
