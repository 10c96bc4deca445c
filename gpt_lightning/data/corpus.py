"""Texts: The Verdict, the sample story, a file or a folder of files."""

import hashlib
import os
from importlib.resources import files
from pathlib import Path

from gpt_lightning.data.folders import files_in
from gpt_lightning.data.tokenizer import END_OF_TEXT
from gpt_lightning.data.unicode import decode_text
from gpt_lightning.storage.cache import cache_folder

VERDICT_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
    "ch02/01_main-chapter-code/the-verdict.txt"
)
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"

VERDICT = "the-verdict.txt"

TEXT_SUFFIXES = (".txt", ".md")


def read_corpus(text: str) -> str:
    """The text that ``data.text`` names: ``verdict``, ``sample``, a file, or a folder.

    A folder is its ``.txt`` and ``.md`` files as :func:`files_in` finds them, with ``<|endoftext|>`` between
    them. A byte order mark is removed, and all line ends are ``\\n``.

    Raises:
        ValueError: The text is empty, or not UTF-8.
        OSError: It cannot be found or read, or The Verdict cannot be downloaded.
    """
    if text == "verdict":
        return _read_file(_verdict())
    if text == "sample":
        return decode_text(files("gpt_lightning.data").joinpath("sample.txt").read_bytes())
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f"data.text: {text} does not exist; give 'verdict', 'sample', a text file or a folder"
        )
    return _read_file(path)


def _read_folder(folder: Path) -> str:
    paths = text_files(folder)
    if not paths:
        raise FileNotFoundError(
            f"data.text: {folder} holds no text files; expected {' or '.join(TEXT_SUFFIXES)} files that are not "
            "hidden, or a token store of prepare"
        )
    return END_OF_TEXT.join(_read_file(path) for path in paths)


def text_files(path: Path) -> list[Path]:
    """The files that :func:`read_corpus` reads of a file or folder."""
    if not path.is_dir():
        return [path]
    return files_in(path, lambda file: file.suffix.lower() in TEXT_SUFFIXES)


def _read_file(path: Path) -> str:
    try:
        text = decode_text(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"data.text: {path} {error}; convert it to UTF-8") from error
    except OSError as error:
        raise OSError(f"data.text: {path} cannot be read: {error.strerror}; check it") from error
    if not text.strip():
        raise ValueError(f"data.text: {path} is empty; give a file with text in it")
    return text


def _verdict() -> Path:
    """Path of The Verdict in the cache; it is downloaded if it is missing, and verified either way."""
    path = cache_folder() / VERDICT
    if not path.exists():
        _download_verdict(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 != VERDICT_SHA256:
        raise ValueError(
            f"data.text: {path} is not The Verdict: SHA-256 {sha256}, expected {VERDICT_SHA256}; "
            "remove it and run again"
        )
    return path


def _download_verdict(path: Path) -> None:
    import pooch
    import requests

    pooch.get_logger().setLevel("ERROR")
    remedy = f"put the file (from {VERDICT_URL}) at {path}"
    try:
        pooch.retrieve(
            VERDICT_URL,
            known_hash=f"sha256:{VERDICT_SHA256}",
            fname=path.name,
            path=path.parent,
            downloader=pooch.HTTPDownloader(timeout=30),
        )
    except requests.RequestException as error:
        raise OSError(
            f"data.text: The Verdict is not cached and cannot be downloaded "
            f"({type(error).__name__}); {remedy}"
        ) from error
    except ValueError as error:  # from pooch: the checksum is wrong, and the file was removed
        raise ValueError(
            f"data.text: {VERDICT_URL} did not answer with The Verdict (its SHA-256 differs, "
            f"expected {VERDICT_SHA256}); {remedy}"
        ) from error
