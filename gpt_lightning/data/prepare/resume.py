"""Whether a store that is there was made, or begun, of these sources with these settings."""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from gpt_lightning.data.prepare.chunk import CHUNK_BYTES, EOT_BYTES, ReadPosition, TextChunk
from gpt_lightning.data.prepare.inputs import InputFile, open_lines
from gpt_lightning.data.prepare.readers import read_chunks
from gpt_lightning.data.prepare.rows import as_python


def check_same(out: Path, there: dict[str, Any], about: dict[str, Any]) -> None:
    _check_settings(out, there, about)
    known, own = _identities(there), _identities(about)
    if known != own:
        differing = next(
            (i for i, (a, b) in enumerate(zip(known, own, strict=False)) if a != b),
            min(len(known), len(own)),
        )
        named = (about if differing < len(own) else there)["sources"][differing]["path"]
        raise ValueError(
            f"{out}: holds a store of other sources ({len(known)}, now {len(own)}; the first that "
            f"differs: {named}); give another --out"
        )


def check_unfinished(
    out: Path, there: dict[str, Any], about: dict[str, Any], sources: Sequence[InputFile]
) -> None:
    """Whether the sources begin with what was read of them for an unfinished store.

    Raises:
        ValueError: They do not, or the settings are others.
    """
    recorded = there["position"]
    _check_settings(out, there, about)
    at, sums = ReadPosition(*recorded["at"]), recorded.get("sums", [])
    anew = f"remove {out} to begin anew, or give another --out"
    known, own = _identities(there), _identities(about)
    read = at.source + (at.offset > 0)
    for i, before in enumerate(known[:read]):
        now = own[i] if i < len(own) else None
        if before == now:
            continue
        name = there["sources"][i]["path"]
        if now is None or i < at.source or before[0] != now[0]:
            why = f"{name} was read for it, and has changed or is not in its place"
        elif at.split is not None:
            why = f"in {name} a document was changed of which a part is written"
        elif not has_same_prefix(sources[i], about["settings"]["field"], sums):
            why = f"{name} was changed in what was read of it already"
        else:
            continue
        raise ValueError(f"{out}: is unfinished, and {why}; {anew}")
    cuts = [source.train_until for source in sources[:read]]
    for i, (cut, now_cut) in enumerate(zip(recorded.get("cuts", cuts), cuts, strict=False)):
        if cut == now_cut or (i == at.source and min(cut, now_cut) > at.offset):
            continue
        raise ValueError(
            f"{out}: is unfinished, and with --split ratio the sources' sizes, which have changed, "
            f"decide where validation begins: now elsewhere in what was read already; {anew}"
        )


def _check_settings(out: Path, there: dict[str, Any], about: dict[str, Any]) -> None:
    if there.get("reader", 1) != about["reader"]:
        raise ValueError(
            f"{out}: was prepared by a version that reads byte order marks and line ends differently; "
            "remove it, or give another --out"
        )
    for name, value in about["settings"].items():
        before = there["settings"].get(name)
        if before != value:
            raise ValueError(
                f"{out}: was begun with --{name} {before}, not {value}; give that, or another --out"
            )


def _identities(about: dict[str, Any]) -> list[tuple[str, int, str]]:
    return [(each["kind"], each["bytes"], each["sha256"]) for each in about["sources"]]


def read_for(piece: TextChunk) -> Iterator[bytes]:
    """What was read for a piece: a text's or lines' bytes, rows as Python writes them."""
    begin, end = piece.at.offset, piece.after.offset
    if piece.source.kind in ("parquet", "dataset"):
        yield _written(piece.content)
    elif len(piece.content) == end - begin:
        yield piece.content
    else:  # a mark, or what was skipped
        with piece.source.path.open("rb") as file:
            file.seek(begin)
            while block := file.read(min(CHUNK_BYTES, end - file.tell())):
                yield block


def _written(rows: Any) -> bytes:
    return "".join(f"{row!r}\n" for row in as_python(rows)).encode(errors="surrogatepass")


def has_same_prefix(source: InputFile, field: str, sums: Sequence[tuple[int, str]]) -> bool:
    """Whether a source's stretches are those that were read, and a document begins after them.

    Args:
        sums: Where each stretch ended, and its SHA-256.

    Raises:
        ValueError, OSError: It cannot be read so far.
    """
    if source.kind in ("parquet", "dataset"):
        pieces = read_chunks([source], ReadPosition(), field=field, val_ratio=0)
        written = (_written(piece.content) for piece in pieces if piece.problem is None)
        rows = (row for block in written for row in block.splitlines(keepends=True))
        return bool(sums) and all(
            _sum(islice(rows, end - begin)) == expected
            for begin, (end, expected) in zip([0, *(end for end, _ in sums)], sums, strict=False)
        )
    place, last = 0, b""
    with open_lines(source.path) as (file, _):
        for end, expected in sums:
            digest = sha256()
            while block := file.read(min(CHUNK_BYTES, end - place)):
                digest.update(block)
                place += len(block)
                last = (last + block)[-len(EOT_BYTES) :]
            if digest.hexdigest() != expected:
                return False
    return last.endswith(EOT_BYTES if source.kind == "text" else b"\n")


def _sum(blocks: Iterable[bytes]) -> str:
    digest = sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()
