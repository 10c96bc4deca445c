"""Download of the tasks' official files into the cache. Every file has a known checksum."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from gpt_lightning.evals.task_names import DOWNLOAD_NAMES, TaskName
from gpt_lightning.storage.atomic import atomic_output, created_folder
from gpt_lightning.storage.cache import cache_folder
from gpt_lightning.storage.checksum import cached_sha256
from gpt_lightning.storage.http_download import ExpectedFile, OnBytes, fetch, matches_checksum
from gpt_lightning.storage.lock import lock_file


@dataclass(frozen=True)
class TaskDownload:
    """Where a task's file comes from.

    Attributes:
        sha256: Of the file.
        bases: Addresses of folders that have ``source``, the official one first.
        source: The name of the file there.
        expected: What is known about ``source``.
        member: The file's name in ``source``, if that is a ZIP archive.
    """

    file: str
    sha256: str
    bases: tuple[str, ...]
    source: str
    expected: ExpectedFile
    member: str | None = None


def _plain(file: str, base: str, size: int | None, sha256: str) -> TaskDownload:
    return TaskDownload(file, sha256, (base,), file, ExpectedFile(size, f"sha256:{sha256}"))


TASK_DOWNLOADS: dict[TaskName, TaskDownload] = {
    "hellaswag": _plain(
        "hellaswag_val.jsonl",
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data",
        None,
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    ),
    "lambada": _plain(
        "lambada_test.jsonl",
        "https://openaipublic.blob.core.windows.net/gpt-2/data",
        1819752,
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
    "wikitext": TaskDownload(
        "wiki.test.raw",
        "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
        (  # of its author Stephen Merity, and the copy that llama.cpp reads
            "https://wikitext.smerity.com",
            "https://huggingface.co/datasets/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9",
        ),
        "wikitext-2-raw-v1.zip",
        ExpectedFile(
            4721645, "sha256:ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"
        ),
        "wikitext-2-raw/wiki.test.raw",
    ),
}


def task_folder(task: TaskName) -> Path:
    """The cache folder for a task's file. A user may also put the file there."""
    return cache_folder() / "tasks" / DOWNLOAD_NAMES[task]


def find_task_file(task: TaskName, alternative: str) -> str:
    """The path of a task's downloaded file, verified.

    Args:
        alternative: How a user names another file, for the message.

    Raises:
        FileNotFoundError: It is not downloaded.
        ValueError: It is damaged.
    """
    download = TASK_DOWNLOADS[task]
    path = task_folder(task) / download.file
    command = f"python -m gpt_lightning download {DOWNLOAD_NAMES[task]}"
    if not path.is_file():
        raise FileNotFoundError(
            f"{task}: its file is not downloaded; run {command}, or give a file with {alternative}"
        )
    if cached_sha256(path) != download.sha256:
        raise ValueError(f"{path}: is not the official file; run {command}, or give it by its name")
    return str(path)


def download_task(
    task: TaskName,
    *,
    folder: Path | None = None,
    mirror: str | None = None,
    on_bytes: OnBytes = lambda name, done, size: None,
    on_damage: Callable[[Path], None] = lambda path: None,
    pause: float = 1.0,
) -> Path:
    """Download a task's file if it is missing or damaged, and return its folder.

    The file gets its name only when it is complete and its checksum is right. Interrupted downloads resume.

    Args:
        folder: For the file. ``None``: :func:`task_folder`, where the task finds it.
        mirror: The address of a folder with the file, which is tried first.
        on_damage: Called with a damaged file before it is downloaded again.
        pause: Seconds before the second attempt; twice as long before the third.

    Raises:
        OSError: The file cannot be downloaded. The message names it and its folder.
    """
    download = TASK_DOWNLOADS[task]
    folder = folder or task_folder(task)
    path = folder / download.file
    with created_folder(folder):
        try:
            with lock_file(folder / ".lock"):
                if path.is_file():
                    if matches_checksum(path, f"sha256:{download.sha256}"):
                        return folder
                    on_damage(path)
                _download(download, path, mirror, on_bytes, pause)
        except Timeout as error:
            raise OSError(
                f"download: another process is downloading into {folder}; wait for it"
            ) from error
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise OSError(
                f"download: {download.file} cannot be downloaded ({error}); try again, or put it into {folder}"
            ) from error
    return folder


def _download(
    download: TaskDownload, path: Path, mirror: str | None, on_bytes: OnBytes, pause: float
) -> None:
    bases = (mirror.rstrip("/"), *download.bases) if mirror else download.bases
    urls = [f"{base}/{download.source}" for base in bases]
    source = path.with_name(download.source)
    fetch(urls, source, download.expected, on_bytes, pause)
    if download.member is None:
        return
    try:
        with zipfile.ZipFile(source) as archive, atomic_output(path) as temporary:
            temporary.write_bytes(archive.read(download.member))
    finally:
        source.unlink()
