"""Byte-level BPE from a ``tokenizer.json`` of Hugging Face's ``tokenizers``, which encodes the text.

That package is an extra: it brings Hugging Face's client with it, and GPT-2's tokenizer does not need it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    GPT2,
    Tokenizer,
    byte_characters,
    merge_pairs,
    merges,
    token_ids,
)
from gpt_lightning.data.unicode import utf8_text

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
# the delimiter of documents is the first of these that a vocabulary has
END_OF_TEXT_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_MAX_IDS = 1 << 22  # the largest public vocabularies have 260,000
_REMEDY = "give a tokenizer.json of byte-level BPE, such as train-tokenizer writes"
# settings of BPE with which the tokens of a text are not its bytes, or not always the same
_OTHER_BPE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``, or of a folder that has one; :data:`GPT2` if it is GPT-2's.

    Raises:
        ValueError: It is damaged, or not byte-level BPE.
        OSError: It cannot be read, or the package ``tokenizers`` is not installed.
    """
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: {path} does not exist; {_REMEDY}")
    resolved = path.resolve()
    name = resolved.parent.name if path.name == FILE else path.stem
    try:
        return tokenizer_from(path.read_bytes(), name)
    except ValueError as error:
        raise ValueError(f"tokenizer: {path} {error}; {_REMEDY}") from error


@lru_cache(maxsize=8)
def tokenizer_from(file: bytes, name: str) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json`` by its content; :data:`GPT2` if it is GPT-2's.

    Raises:
        ValueError: It is damaged, or not byte-level BPE; the message is the cause without a name.
        OSError: The package ``tokenizers`` is not installed.
    """
    try:
        content = json.loads(file)
        if next(gpt2_differences(content), None) is None:
            return GPT2
    except (ValueError, RecursionError) as error:
        raise ValueError("is not JSON") from error
    except (TypeError, KeyError, AttributeError):
        pass  # the next check says what is wrong
    try:
        tokens = _token_bytes(content)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        if type(error) is ValueError:
            raise
        raise ValueError("is damaged") from error
    end_of_text_id = next(
        (tokens.index(token.encode()) for token in END_OF_TEXT_TOKENS if token.encode() in tokens),
        None,
    )
    if end_of_text_id is None:
        raise ValueError(f"has no token that ends a document ({', '.join(END_OF_TEXT_TOKENS)})")
    backend = _Backend(file, end_of_text_id)
    backend.check()
    return Tokenizer(
        name,
        {"sha256": hashlib.sha256(file).hexdigest()},
        vocab_size=len(tokens),
        end_of_text_id=end_of_text_id,
        encode=backend.encode,
        encode_documents=backend.encode_documents,
        token_bytes=tokens.copy,
        file=file,
    )


@final
@dataclass(frozen=True)
class _Backend:
    """Encodes by the package ``tokenizers``, in threads that do not hold Python's lock.

    Special tokens (``"special": true`` in the file) in a text are plain characters, unless they are asked for.
    Other additional tokens are always tokens.
    """

    file: bytes
    end_of_text_id: int

    def check(self) -> None:
        """Raise ``ValueError`` if the package cannot read the file, and ``OSError`` if it is not installed."""
        check_library("tokenizer: another one than GPT-2's")
        assert self._plain

    @cached_property
    def _plain(self) -> "tokenizers.Tokenizer":
        return self._loaded(plain=True)

    @cached_property
    def _special(self) -> "tokenizers.Tokenizer":
        return self._loaded(plain=False)

    def _loaded(self, *, plain: bool) -> "tokenizers.Tokenizer":
        import tokenizers

        try:
            loaded = tokenizers.Tokenizer.from_str(self.file.decode("utf-8"))
        except BaseException as error:  # a panic of Rust is not an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(f"is damaged ({' '.join(str(error).split())[:80]})") from error
        loaded.no_truncation()
        loaded.no_padding()
        loaded.encode_special_tokens = plain
        return loaded

    def encode(self, text: str, special: bool) -> NDArray[np.uint32]:
        (ids,) = self._encode([text], self._special if special else self._plain)
        return ids

    def encode_documents(self, documents: Sequence[str]) -> NDArray[np.uint32]:
        delimiter = np.array([self.end_of_text_id], dtype=np.uint32)
        parts: list[NDArray[np.uint32]] = []
        for ids in self._encode(documents, self._plain):
            parts += [ids, delimiter]
        return np.concatenate(parts[:-1]) if parts else np.empty(0, dtype=np.uint32)

    def _encode(
        self, texts: Sequence[str], tokenizer: "tokenizers.Tokenizer"
    ) -> list[NDArray[np.uint32]]:
        try:
            encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # what the package raises for text that UTF-8 cannot hold
            valid = [utf8_text(text) for text in texts]
            encodings = tokenizer.encode_batch_fast(valid, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


def check_library(what: str) -> None:
    """Raise ``OSError`` if the package ``tokenizers`` is not installed; ``what`` needs it."""
    if find_spec("tokenizers") is None:
        raise OSError(
            f"{what} needs the package tokenizers; pip install 'gpt-lightning[tokenizers]'"
        )


def train_byte_level(texts: Iterator[str], vocab_size: int) -> bytes:
    """The ``tokenizer.json`` of a vocabulary that is trained on texts, which are split by GPT-2's pattern.

    The ids are the delimiter ``<|endoftext|>``, the bytes, then the merges in their order.
    """
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_characters()),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return (trained.to_str(pretty=True) + "\n").encode()


# --- the content of a file --------------------------------------------------------------------------


def _token_bytes(content: dict[str, Any]) -> list[bytes]:
    """The bytes of each token; ``ValueError`` if it is not byte-level BPE."""
    if not isinstance(content, dict):
        raise ValueError("is not a JSON object")
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"holds a {model['type']} tokenizer, not byte-level BPE")
    for key in _OTHER_BPE:
        if model.get(key):
            raise ValueError(f"has {key} {model[key]!r}, unlike byte-level BPE")
    for key in ("pre_tokenizer", "decoder"):
        if not _is_byte_level(content.get(key)):
            raise ValueError(f"is not byte-level BPE: its {key} is not ByteLevel")
    vocabulary: dict[str, int] = model["vocab"]
    byte_of = byte_characters()
    if missing := byte_of.keys() - vocabulary.keys():
        raise ValueError(
            f"is not byte-level BPE: it lacks tokens of {len(missing)} of the 256 bytes"
        )
    added = {str(token["content"]): token["id"] for token in content.get("added_tokens") or []}
    ids = [*vocabulary.values(), *added.values()]
    if not all(type(i) is int and 0 <= i < _MAX_IDS for i in ids):
        raise ValueError("has ids that are not whole numbers below 4 million")
    tokens = [b""] * (max(ids) + 1)
    for token, i in vocabulary.items():
        known = all(character in byte_of for character in token)
        tokens[i] = bytes(byte_of[c] for c in token) if known else token.encode()
    for token, i in added.items():
        tokens[i] = token.encode()
    return tokens


def _is_byte_level(part: Any) -> bool:
    """Whether a pre-tokenizer or decoder is ByteLevel, alone or in a sequence."""
    if not isinstance(part, dict):
        return False
    if part.get("type") == "Sequence":
        return any(map(_is_byte_level, part.get("pretokenizers") or part.get("decoders") or []))
    return part.get("type") == "ByteLevel"


def gpt2_differences(content: Any) -> Iterator[str]:
    """How the content of a ``tokenizer.json`` differs from GPT-2's tokenizer; the layout does not matter."""
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        yield f"holds a {model['type']} tokenizer"
    added = [(token["content"], token["id"]) for token in content.get("added_tokens") or []]
    for token in added:
        if token != (END_OF_TEXT, END_OF_TEXT_ID):
            yield f"adds the token {token[0]!r}"
    # <|endoftext|> may be in either list
    if {**model["vocab"], **dict(added)} != token_ids():
        yield "has another vocabulary"
    if merge_pairs(model["merges"]) != merges():
        yield "has other merges"
    for key in (*_OTHER_BPE, "ignore_merges"):
        if model.get(key):
            yield f"has {key} {model[key]!r}"
    if content.get("normalizer") is not None:
        yield "has a normalizer"
    if not splits_as_gpt2(content.get("pre_tokenizer")):
        yield "splits text differently"
    if adds_tokens(content.get("post_processor")):
        yield "adds tokens to each text"
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        yield "decodes tokens differently"


def splits_as_gpt2(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer splits text by GPT-2's pattern, without a blank before it."""
    return (
        isinstance(pre_tokenizer, dict)
        and pre_tokenizer.get("type") == "ByteLevel"
        and not pre_tokenizer.get("add_prefix_space", True)
        and bool(pre_tokenizer.get("use_regex", True))
    )


def adds_tokens(post_processor: Any) -> bool:
    """Whether a post-processor adds tokens to each text."""
    if post_processor is None or post_processor["type"] == "ByteLevel":
        return False
    if post_processor["type"] == "Sequence":
        return any(map(adds_tokens, post_processor["processors"]))
    if post_processor["type"] == "TemplateProcessing":
        return any("SpecialToken" in part for part in post_processor["single"])
    return True


def gpt2_content() -> dict[str, Any]:
    """GPT-2's tokenizer as the content of a ``tokenizer.json``."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(END_OF_TEXT, END_OF_TEXT_ID, special=True)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": token_ids(),
            "merges": [list(pair) for pair in merges()],
        },
    }


def added_token(text: str, token_id: int, *, special: bool) -> dict[str, Any]:
    """An entry of ``added_tokens``: a token that splits the text wherever it occurs."""
    return {
        "id": token_id,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def file_of(content: Mapping[str, Any]) -> bytes:
    """The bytes of a ``tokenizer.json``."""
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
