"""Splits of ``prepare``: checks that neither is empty, and finds where training ends, before tokenizing."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

from gpt_lightning.data.prepare.chunk import split_of
from gpt_lightning.data.prepare.inputs import InputFile
from gpt_lightning.data.prepare.plain_text import document_hashes, text_cut
from gpt_lightning.data.prepare.readers import measure

SplitBy = Literal["hash", "ratio"]


def empty_split_message(name: str, documents: int, split: SplitBy) -> str:
    purpose = {"train": "training", "val": "validation"}[name]
    remedy = "" if split == "ratio" else "--split ratio, "
    return (
        f"split: none of {documents} document(s) is for {purpose}; give {remedy}another --val_ratio, or more "
        "documents (--val_ratio 0 is a store for training alone)"
    )


def check_texts(sources: Sequence[InputFile], split: SplitBy, val_ratio: float) -> None:
    """Refuse texts whose few documents are all in one split, before they are tokenized.

    Raises:
        ValueError: A split would be empty.
    """
    if split != "hash" or val_ratio == 0 or any(s.kind != "text" for s in sources):
        return
    documents: list[Path] = []
    splits = set()
    for path, digest in document_hashes(sources):
        if digest is None:  # it is refused, or skipped, when it is read
            return
        documents.append(path)
        splits.add(split_of(digest, val_ratio))
        if len(splits) == 2:
            return
    if len(documents) == 1:
        raise ValueError(
            f"split: {documents[0]} is one document, which the hash of its content puts in one split; "
            "give --split ratio, or --val_ratio 0 for training alone"
        )
    if documents:
        raise ValueError(
            empty_split_message("val" if "train" in splits else "train", len(documents), split)
        )


def with_cuts(
    sources: list[InputFile], split: SplitBy, val_ratio: float, *, skip: bool
) -> list[InputFile]:
    """The inputs, for 'ratio' with the offset or row where the training split ends in each."""
    if split != "ratio":
        return sources
    remaining = (1 - Fraction(str(val_ratio))) * sum(source.bytes for source in sources)
    with_end = []
    for source in sources:
        size = measure(source, skip=skip)
        if remaining >= source.bytes:
            until = size
        elif remaining <= 0:
            until = 0
        else:
            until = -int(-remaining * size // source.bytes)
            if source.kind == "text":
                until = text_cut(source.path, until, size)
        with_end.append(replace(source, train_until=until))
        remaining -= source.bytes
    return with_end
