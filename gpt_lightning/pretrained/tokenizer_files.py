"""The tokenizer in the files beside weights: GPT-2's, or that of a ``tokenizer.json``."""

import json
from collections.abc import Iterator, Sequence
from os.path import lexists
from pathlib import Path
from typing import Any

from gpt_lightning.data.tokenizer import (
    END_OF_TEXT,
    GPT2,
    Tokenizer,
    merge_pairs,
    merges,
    merges_of,
    token_ids,
    vocabulary_bytes,
)
from gpt_lightning.data.tokenizer_json import (
    FILE,
    adds_tokens,
    gpt2_differences,
    read_tokenizer,
    splits_as_gpt2,
)

_VOCABULARIES = ("vocab.json", "encoder.json")
_MERGES = ("merges.txt", "vocab.bpe")
_FILES = (*_VOCABULARIES, *_MERGES, FILE)
_MAX_PADDED = 51200  # GPT-2's 50257 tokens padded to a multiple of 1,024, the most that is usual
# files of other tokenizers; the last is nanoGPT's, a pickle: it may hold code, so it is never opened
_OTHER_TOKENIZERS = (
    "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "meta.pkl",
)  # fmt: skip
# GPT-2's own classes, which read vocabulary and merges only, and those that load any tokenizer.json
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_CLASSES = (
    *_GPT2_CLASSES, "PreTrainedTokenizerFast", "TokenizersBackend", "AutoTokenizer",
)  # fmt: skip
_SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
    "additional_special_tokens", "extra_special_tokens",
)  # fmt: skip
# settings that change the token ids of a text
_SETTINGS = ("add_prefix_space", "add_bos_token", "add_eos_token", "do_lower_case", "auto_map")


def folder_tokenizer(folder: Path, vocab_size: int) -> tuple[Tokenizer, str | None]:
    """The tokenizer of a folder of weights. If it cannot be read: GPT-2's, and why it is another one."""
    difference = tokenizer_difference(folder, vocab_size)
    if difference is None or not (folder / FILE).is_file():
        return GPT2, difference
    tokenizer, conflict = GPT2, None
    try:
        tokenizer = read_tokenizer(folder / FILE)
        conflict = None if tokenizer is GPT2 else next(_conflicts(folder, tokenizer), None)
    except (ValueError, OSError, TypeError, AttributeError, KeyError, RecursionError) as error:
        conflict = " ".join(str(error).split()).partition(";")[0].removeprefix("tokenizer: ")
    if tokenizer is GPT2 or conflict is not None:
        return GPT2, ", and ".join(filter(None, (difference, conflict)))
    return tokenizer, None


def tokenizer_difference(folder: Path, vocab_size: int) -> str | None:
    """How the tokenizer in ``folder`` differs from GPT-2's; ``None`` if it does not.

    The content is compared, not the layout of the files. An additional token is a difference too: a text that
    contains it has other token ids. Without tokenizer files, the size of the vocabulary decides.
    """
    try:
        if not any(lexists(folder / name) for name in _FILES) and vocab_size > _MAX_PADDED:
            return f"its vocabulary has {vocab_size} tokens"
        return next(_gpt2_differences(folder), None)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        cause = " ".join(str(error).split())[:80]
        return f"the tokenizer files in {folder} cannot be read ({cause})"


def _gpt2_differences(folder: Path) -> Iterator[str]:
    yield from _differences(folder, GPT2, token_ids(), merges())
    if lexists(path := folder / FILE):
        yield from (f"{path} {difference}" for difference in gpt2_differences(_json(path)))
    if lexists(path := folder / "config.json"):
        yield from _other_class(_json(path), path)


def _conflicts(folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Files and settings with which a text has other ids than by the ``tokenizer.json`` beside them."""
    content = _json(folder / FILE)
    model = content["model"]
    yield from _differences(folder, tokenizer, model["vocab"], merge_pairs(model["merges"]))
    if adds_tokens(content.get("post_processor")):
        yield f"{folder / FILE} adds tokens to each text"
    path = folder / "tokenizer_config.json"
    is_gpt2s = lexists(path) and _json(path).get("tokenizer_class") in _GPT2_CLASSES
    if is_gpt2s and (content.get("normalizer") or not splits_as_gpt2(content["pre_tokenizer"])):
        yield f"{path} names a class that does not read its normalizer and pre_tokenizer"


def _differences(
    folder: Path,
    tokenizer: Tokenizer,
    vocabulary: dict[str, int],
    pairs: Sequence[tuple[str, ...]],
) -> Iterator[str]:
    """Files and settings beside a ``tokenizer.json`` that are not those of ``tokenizer``."""
    for name in _OTHER_TOKENIZERS:
        if lexists(folder / name):
            yield f"{folder / name} belongs to another tokenizer"
    for name in _VOCABULARIES:
        if lexists(folder / name) and _json(folder / name) != vocabulary:
            yield f"{folder / name} has another vocabulary"
    for name in _MERGES:
        path = folder / name
        if lexists(path) and merges_of(path.read_text(encoding="utf-8")) != pairs:
            yield f"{path} has other merges"
    if lexists(path := folder / "added_tokens.json"):
        yield from _added_tokens(_json(path).items(), path, tokenizer)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if lexists(path := folder / name):
            yield from _settings_differences(_json(path), path, tokenizer)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _added_tokens(tokens: Any, path: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Differences by additional tokens. ``tokens`` are pairs of a token and its id."""
    for token, i in tokens:
        if tokenizer.token_bytes[i : i + 1] != [token.encode()] or (
            tokenizer is GPT2 and token != END_OF_TEXT
        ):
            yield f"{path} adds the token {token!r}"


def _other_class(settings: Any, path: Path) -> Iterator[str]:
    class_name = settings.get("tokenizer_class")
    if class_name is not None and class_name not in _CLASSES:
        yield f"{path} names {class_name}"


def _settings_differences(settings: Any, path: Path, tokenizer: Tokenizer) -> Iterator[str]:
    yield from _other_class(settings, path)
    for key in _SETTINGS:
        if settings.get(key):
            yield f"{path} has {key} {settings[key]!r}"
    added = settings.get("added_tokens_decoder") or {}
    pairs = ((token["content"], int(i)) for i, token in added.items())
    yield from _added_tokens(pairs, path, tokenizer)
    for key in _SPECIAL_TOKENS:
        tokens = settings.get(key) or []
        if isinstance(tokens, dict):
            tokens = [tokens] if "content" in tokens else list(tokens.values())
        for token in tokens if isinstance(tokens, list) else [tokens]:
            text = token["content"] if isinstance(token, dict) else token
            is_known = text == END_OF_TEXT
            if tokenizer is not GPT2:
                is_known = text.encode() in tokenizer.token_bytes
            if not is_known:
                yield f"{path} has the special token {text!r}"


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that ``AutoTokenizer.from_pretrained`` reads."""
    if tokenizer.file is None:
        for ours, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
            (folder / theirs).write_bytes(vocabulary_bytes(ours))
        return
    (folder / FILE).write_bytes(tokenizer.file)
    end_of_text = tokenizer.token_bytes[tokenizer.end_of_text_id].decode()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8", newline="\n")
