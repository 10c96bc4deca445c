"""Check whether the tokenizer files beside weights hold GPT-2's tokenizer."""

import json
from collections.abc import Iterator
from os.path import lexists
from pathlib import Path
from typing import Any

from gpt_lightning.data.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, merges, merges_of, token_ids

_VOCABULARIES = ("vocab.json", "encoder.json")
_MERGES = ("merges.txt", "vocab.bpe")
_FILES = (*_VOCABULARIES, *_MERGES, "tokenizer.json")
_MAX_PADDED = 51200  # GPT-2's 50257 tokens padded to a multiple of 1,024, the most that is usual
# files of other tokenizers; the last is nanoGPT's, a pickle: it may hold code, so it is never opened
_OTHER_TOKENIZERS = (
    "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "meta.pkl",
)  # fmt: skip
# GPT-2's own classes, and those that load any tokenizer.json
_CLASSES = (
    "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "AutoTokenizer",
)  # fmt: skip
_SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
    "additional_special_tokens", "extra_special_tokens",
)  # fmt: skip
# settings that change the token ids of a text
_SETTINGS = ("add_prefix_space", "add_bos_token", "add_eos_token", "do_lower_case", "auto_map")


def tokenizer_difference(folder: Path, vocab_size: int) -> str | None:
    """How the tokenizer in ``folder`` differs from GPT-2's; ``None`` if it does not.

    The content is compared, not the layout of the files. An additional token is a difference too: a text that
    contains it has other token ids. Without tokenizer files, the size of the vocabulary decides.
    """
    try:
        if not any(lexists(folder / name) for name in _FILES) and vocab_size > _MAX_PADDED:
            return f"its vocabulary has {vocab_size} tokens"
        return next(_differences(folder), None)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        cause = " ".join(str(error).split())[:80]
        return f"the tokenizer files in {folder} cannot be read ({cause})"


def _differences(folder: Path) -> Iterator[str]:
    for name in _OTHER_TOKENIZERS:
        if lexists(folder / name):
            yield f"{folder / name} belongs to another tokenizer"
    for name in _VOCABULARIES:
        if lexists(folder / name) and _json(folder / name) != token_ids():
            yield f"{folder / name} has another vocabulary"
    for name in _MERGES:
        path = folder / name
        if lexists(path) and merges_of(path.read_text(encoding="utf-8")) != merges():
            yield f"{path} has other merges"
    if lexists(path := folder / "added_tokens.json"):
        yield from _added_tokens(_json(path).items(), path)
    if lexists(path := folder / "tokenizer.json"):
        yield from _tokenizer_json_differences(_json(path), path)
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if lexists(path := folder / name):
            yield from _settings_differences(_json(path), path)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _added_tokens(tokens: Any, path: Path) -> Iterator[str]:
    """Differences by additional tokens. ``tokens`` are pairs of a token and its id."""
    for token, i in tokens:
        if (token, i) != (END_OF_TEXT, END_OF_TEXT_ID):
            yield f"{path} adds the token {token!r}"


def _tokenizer_json_differences(content: Any, path: Path) -> Iterator[str]:
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        yield f"{path} holds a {model['type']} tokenizer"
    added = [(token["content"], token["id"]) for token in content.get("added_tokens") or []]
    yield from _added_tokens(added, path)
    # <|endoftext|> may be in either list
    if {**model["vocab"], **dict(added)} != token_ids():
        yield f"{path} has another vocabulary"
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    if pairs != merges():
        yield f"{path} has other merges"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges",
                "byte_fallback"):  # fmt: skip
        if model.get(key):
            yield f"{path} has {key} {model[key]!r}"
    if content.get("normalizer") is not None:
        yield f"{path} has a normalizer"
    if not _splits_as_gpt2(content.get("pre_tokenizer")):
        yield f"{path} splits text differently"
    if _adds_tokens(content.get("post_processor")):
        yield f"{path} adds tokens to each text"
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        yield f"{path} decodes tokens differently"


def _splits_as_gpt2(pre_tokenizer: Any) -> bool:
    return (
        isinstance(pre_tokenizer, dict)
        and pre_tokenizer.get("type") == "ByteLevel"
        and not pre_tokenizer.get("add_prefix_space", True)
        and bool(pre_tokenizer.get("use_regex", True))
    )


def _adds_tokens(post_processor: Any) -> bool:
    if post_processor is None or post_processor["type"] == "ByteLevel":
        return False
    if post_processor["type"] == "Sequence":
        return any(map(_adds_tokens, post_processor["processors"]))
    if post_processor["type"] == "TemplateProcessing":
        return any("SpecialToken" in part for part in post_processor["single"])
    return True


def _settings_differences(settings: Any, path: Path) -> Iterator[str]:
    class_name = settings.get("tokenizer_class")
    if class_name is not None and class_name not in _CLASSES:
        yield f"{path} names {class_name}"
    if path.name == "config.json":
        return
    for key in _SETTINGS:
        if settings.get(key):
            yield f"{path} has {key} {settings[key]!r}"
    added = settings.get("added_tokens_decoder") or {}
    yield from _added_tokens(((token["content"], int(i)) for i, token in added.items()), path)
    for key in _SPECIAL_TOKENS:
        tokens = settings.get(key) or []
        if isinstance(tokens, dict):
            tokens = [tokens] if "content" in tokens else list(tokens.values())
        for token in tokens if isinstance(tokens, list) else [tokens]:
            text = token["content"] if isinstance(token, dict) else token
            if text != END_OF_TEXT:
                yield f"{path} has the special token {text!r}"
