"""Files without the page cache have every byte, also where the system has no direct writes."""

import errno
import os
import random
import sys
from pathlib import Path

import pytest

from gpt_lightning.storage.direct_file import BUFFER_SIZE, DirectFile

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has O_DIRECT")
SIZES = [
    [],
    [1],
    [4096],
    [BUFFER_SIZE],
    [BUFFER_SIZE, 1],
    [BUFFER_SIZE - 1, 1],
    [3 * BUFFER_SIZE + 5, 0, 4095],
]


def write(path: Path, parts: list[bytes]) -> None:
    with DirectFile(path) as file:
        assert [file.write(part) for part in parts] == [len(part) for part in parts]
        file.sync()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_file_has_what_was_written(tmp_path: Path, sizes: list[int]) -> None:
    parts = [random.Random(size).randbytes(size) for size in sizes]
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5 * BUFFER_SIZE)  # an older and longer file of this name
    write(path, parts)
    assert path.read_bytes() == b"".join(parts)


def test_many_small_parts(tmp_path: Path) -> None:
    rng = random.Random(0)
    parts = [rng.randbytes(rng.choice([1, 64, 4096, 70_000])) for _ in range(500)]
    write(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)


@linux
@pytest.mark.parametrize("fails", ["open", "write"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_system_without_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, number: int
) -> None:
    import fcntl

    real_open, real_write = os.open, os.write
    refused = []

    def refuse(is_direct: int) -> None:
        if is_direct & os.O_DIRECT:
            refused.append(is_direct)
            raise OSError(number, os.strerror(number))

    def refusing_open(path: Path, flags: int, mode: int = 0o777) -> int:
        refuse(flags)
        return real_open(path, flags, mode)

    def refusing_write(descriptor: int, data: bytes) -> int:
        refuse(fcntl.fcntl(descriptor, fcntl.F_GETFL))
        return real_write(descriptor, data)

    monkeypatch.setattr(os, fails, refusing_open if fails == "open" else refusing_write)
    parts = [random.Random(1).randbytes(2 * BUFFER_SIZE + 3)]
    write(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == parts[0]
    assert len(refused) == 1


@linux
def test_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write may stop anywhere, for example at a signal; what remains need not begin at a block."""
    real_write, rng = os.write, random.Random(2)

    def short_write(descriptor: int, data: memoryview) -> int:
        return real_write(descriptor, data[: rng.choice([len(data), 4096, 1000])])

    monkeypatch.setattr(os, "write", short_write)
    parts = [rng.randbytes(BUFFER_SIZE + 777)]
    write(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == parts[0]


def test_errors_are_those_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "missing" / "file")
    with pytest.raises(IsADirectoryError if os.name == "posix" else PermissionError):
        DirectFile(tmp_path)


@linux
@pytest.mark.parametrize("buffers", [0, 1, 2])
def test_full_disk(buffers: int) -> None:
    """The error of a write in the background is raised by the next one, or by ``sync``."""
    with DirectFile(Path("/dev/full")) as file:
        if buffers < 2:
            file.write(bytes(buffers * BUFFER_SIZE + 1))
        with pytest.raises(OSError, match="No space left"):
            file.write(bytes(buffers * BUFFER_SIZE)) if buffers == 2 else file.sync()
