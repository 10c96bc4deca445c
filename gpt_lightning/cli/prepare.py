"""``prepare``: any amount of text into a token store."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from gpt_lightning.cli.console import BytesProgress
from gpt_lightning.cli.options import CONFIG_HELP
from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.text_options import TextList
from gpt_lightning.data.unicode import for_stream, printable

logger = logging.getLogger(__name__)


def run(arguments: list[str]) -> None:
    """Tokenize text into a token store, a folder for fit: --data.text DIR.

    INPUT is a .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, a folder or a glob of them, or a
    folder that Hugging Face's datasets has saved. <|endoftext|> separates the documents of a text file; in
    the other kinds a row is a document. One <|endoftext|> is written between documents. After an interrupt the
    same command resumes after the last complete shard.
    """
    settings = parse(_parser(), arguments)
    # numpy's library of linear algebra is not used here, and its threads would spin for a while
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from gpt_lightning.data.prepare.pipeline import PrepareConfig, prepare
    from gpt_lightning.data.token_cache import find_tokenizer

    chosen = PrepareConfig(
        settings.field,
        settings.split,
        settings.val_ratio,
        settings.shard_tokens,
        fallback_encoding=_given(
            settings.fallback_encoding, "latin-1" if settings.gutenberg else None
        ),
        strip_gutenberg=settings.strip_gutenberg or settings.gutenberg,
        min_ascii=_given(settings.min_ascii, 0.9 if settings.gutenberg else 0.0),
        collapse_blank_lines=settings.collapse_blank_lines or settings.gutenberg,
    )
    out = Path(os.path.expanduser(settings.out))
    tokenizer = find_tokenizer(settings.tokenizer, [])
    start = time.monotonic()
    try:
        with BytesProgress("preparing") as progress:
            prepared = prepare(
                settings.inputs,
                out,
                chosen,
                tokenizer=tokenizer,
                workers=_cpus() if settings.workers is None else settings.workers,
                skip=settings.on_error == "skip",
                on_progress=progress.advance,
            )
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"before {out} was complete; the same command resumes after its last complete shard"
        ) from error
    manifest = prepared.manifest
    for problem in prepared.problems:
        logger.info(printable(f"skipped: {problem.partition(';')[0]}"))
    if prepared.already_prepared:
        logger.info(printable(f"{out}: is already prepared, from the same inputs"))
    result = {
        "folder": str(out),
        **{
            name: manifest[name]
            for name in ("tokens", "documents", "skipped", "empty", "settings", "tokenizer")
        },
        **({"cleaned": manifest["cleaned"]} if "cleaned" in manifest else {}),
        "shards": {name: len(shards) for name, shards in manifest["shards"].items()},
        "sources": len(manifest["sources"]),
        "already_prepared": prepared.already_prepared,
        "seconds": round(time.monotonic() - start, 3),
    }
    print(json.dumps(result) if settings.json else for_stream(_described(result), sys.stdout))


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _described(result: dict[str, Any]) -> str:
    parts = [
        f"{result['tokens'][split]:,} tokens of {result['documents'][split]:,} documents {what}"
        for split, what in [("train", "for training"), ("val", "for validation")]
    ]
    if result["skipped"]:
        parts.append(f"{result['skipped']:,} that cannot be read skipped")
    if result["empty"]:
        parts.append(f"{result['empty']:,} empty rows left out")
    cleaned, settings = result.get("cleaned", {}), result["settings"]
    if count := cleaned.get("header_or_footer_removed"):
        parts.append(f"Gutenberg's header or footer removed from {count:,}")
    if count := cleaned.get("decoded_by_fallback"):
        parts.append(f"{count:,} not in UTF-8 read as {settings['fallback_encoding']}")
    if count := cleaned.get("too_little_ascii"):
        parts.append(f"{count:,} with less than {settings['min_ascii']:.0%} ASCII left out")
    return f"{result['folder']}: {', '.join(parts)}"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gpt_lightning prepare", description=run.__doc__, exit_on_error=False
    )
    add = parser.add_argument
    add("--config", action="config", help=CONFIG_HELP)
    add("inputs", action=TextList, nargs="+", metavar="INPUT", help="Files, folders, globs.")
    add("--out", type=str, required=True, help="The folder of the token store; new, or unfinished.")
    add(
        "--tokenizer",
        type=str | None,
        metavar="PATH",
        help="A tokenizer.json of byte-level BPE, or a folder with one; null = GPT-2's.",
    )
    add("--field", type=str, default="text", help="The field of a row that holds its text.")
    add(
        "--split",
        type=Literal["hash", "ratio"],
        default="hash",
        help="'hash': each document's content decides, so that adding files moves none; 'ratio': the "
        "last part of the text is for validation.",
    )
    add("--val_ratio", type=float, default=0.1, help="Share for validation; 0 = training alone.")
    add("--workers", type=int | None, help="Threads that tokenize; null = one per CPU.")
    add("--shard_tokens", type=int, default=100_000_000, help="Tokens per shard.")
    add(
        "--on_error",
        type=Literal["stop", "skip"],
        default="stop",
        help="What to do with a document that cannot be read: stop, or leave it out and count it. In a "
        "damaged file the rest is left out, and counted as one document.",
    )
    add(
        "--gutenberg",
        action="store_true",
        help="For books of Project Gutenberg: --strip_gutenberg --collapse_blank_lines --min_ascii 0.9 "
        "--fallback_encoding latin-1.",
    )
    add(
        "--strip_gutenberg",
        action="store_true",
        help="Remove Project Gutenberg's header and footer, with its license, by their markers.",
    )
    add(
        "--collapse_blank_lines",
        action="store_true",
        help="Make one blank line of several.",
    )
    add(
        "--min_ascii",
        type=float | None,
        help="Leave out documents of which less than this share of the characters is ASCII; null = 0, or 0.9 "
        "with --gutenberg.",
    )
    add(
        "--fallback_encoding",
        type=str | None,
        help="Read documents that are not UTF-8 in this encoding, such as latin-1; null = they are an error, "
        "or latin-1 with --gutenberg.",
    )
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser
