"""What is for training and what for validation, as far as it is known before anything is tokenised."""

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


def nothing_in(name: str, documents: int, split: SplitBy) -> str:
    what = {"train": "training", "val": "validation"}[name]
    remedy = "" if split == "ratio" else "--split ratio, "
    return (
        f"split: none of {documents} document(s) is for {what}; give {remedy}another --val_ratio, or more "
        "documents (--val_ratio 0 is a store for training alone)"
    )


def check_texts(sources: Sequence[InputFile], split: SplitBy, val_ratio: float) -> None:
    """Few documents may all be of one split, which is better known before they are tokenised.

    Raises:
        ValueError: They are.
    """
    if split != "hash" or val_ratio == 0 or any(s.kind != "text" for s in sources):
        return
    documents: list[Path] = []
    found = set()
    for path, digest in document_hashes(sources):
        if digest is None:  # which is said, or skipped, when it is read
            return
        documents.append(path)
        found.add(split_of(digest, val_ratio))
        if len(found) == 2:
            return
    if len(documents) == 1:
        raise ValueError(
            f"split: {documents[0]} is one document, which the hash of its content puts in one split; "
            "give --split ratio, or --val_ratio 0 for training alone"
        )
    if documents:
        raise ValueError(nothing_in("val" if "train" in found else "train", len(documents), split))


def with_cuts(
    sources: list[InputFile], split: SplitBy, val_ratio: float, *, skip: bool
) -> list[InputFile]:
    """With 'ratio': where in each source the training split ends."""
    if split != "ratio":
        return sources
    left = (1 - Fraction(str(val_ratio))) * sum(source.bytes for source in sources)
    cut = []
    for source in sources:
        size = measure(source, skip=skip)
        if left >= source.bytes:
            until = size
        elif left <= 0:
            until = 0
        else:
            until = -int(-left * size // source.bytes)
            if source.kind == "text":
                until = text_cut(source.path, until, size)
        cut.append(replace(source, train_until=until))
        left -= source.bytes
    return cut
