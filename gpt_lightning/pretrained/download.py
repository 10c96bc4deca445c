"""Download of GPT-2's public weights from Hugging Face's hub or OpenAI's hosts into the cache."""

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import Timeout
from safetensors import SafetensorError, safe_open

from gpt_lightning.pretrained.downloaded import (
    HUB_FILES,
    OPENAI_DATA,
    OPENAI_FILES,
    OPENAI_INDEX,
    OPENAI_META,
    DownloadHost,
    download_folder,
)
from gpt_lightning.storage.atomic import created_folder, move_into_place
from gpt_lightning.storage.checksum import MANIFEST, damaged_files, write_manifest
from gpt_lightning.storage.http_download import (
    ATTEMPTS,
    NOT_AVAILABLE_STATUS,
    ExpectedFile,
    NotAvailableError,
    OnBytes,
    fetch,
    matches_checksum,
    root_cause,
    verify,
)
from gpt_lightning.storage.lock import lock_file

_HUB = {  # repository, revision, size and checksum of model.safetensors
    "gpt2-124M": (
        "openai-community/gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        ExpectedFile(
            548105171, "sha256:248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
        ),
    ),
    "gpt2-355M": (
        "openai-community/gpt2-medium",
        "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        ExpectedFile(),
    ),
    "gpt2-774M": (
        "openai-community/gpt2-large",
        "32b71b12589c2f8d625668d2335a01cac3249519",
        ExpectedFile(),
    ),
    "gpt2-1558M": (
        "openai-community/gpt2-xl",
        "15ea56dee5df4983c59b2538573817e1667135e2",
        ExpectedFile(
            None, "sha256:0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"
        ),
    ),
}

_OPENAI = (
    "https://openaipublic.blob.core.windows.net/gpt-2/models",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2",
)
_EXPECTED = {  # the same for each size of model
    "encoder.json": ExpectedFile(
        1042301, "sha256:196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    ),
    "vocab.bpe": ExpectedFile(
        456318, "sha256:1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    ),
    "checkpoint": ExpectedFile(77),
}
_EXPECTED_BY_SIZE = {
    "gpt2-124M": {
        "hparams.json": ExpectedFile(90),
        OPENAI_DATA: ExpectedFile(497759232, "md5:f48b9cf1a525a603be52258f69bf9162"),
        OPENAI_INDEX: ExpectedFile(5215),
        OPENAI_META: ExpectedFile(471155),
    },
    "gpt2-355M": {
        "hparams.json": ExpectedFile(91),
        OPENAI_DATA: ExpectedFile(1419292672),
        OPENAI_INDEX: ExpectedFile(10399),
        OPENAI_META: ExpectedFile(926519),
    },
}


def download(
    name: str,
    host: DownloadHost = "hub",
    *,
    folder: Path | None = None,
    mirror: str | None = None,
    on_bytes: OnBytes = lambda name, done, size: None,
    on_damage: Callable[[Path], None] = lambda path: None,
    pause: float = 1.0,
) -> Path:
    """Download the missing and damaged files of a size, and return their folder.

    A file gets its name only when it is complete. Its size and checksum are verified if they are known here or
    the host gives them. All files are recorded in a manifest and verified against it in later runs. Interrupted
    downloads resume: OpenAI's files also in a later run, the hub's within one run.

    Args:
        name: One of ``GPT2_SIZES``.
        folder: For the files. ``None``: :func:`download_folder`, where the name as a SOURCE finds them.
        mirror: Tried first. For OpenAI's files a URL to which ``/124M/hparams.json`` is appended, for the hub
            another endpoint.
        on_damage: Called with a damaged file before it is downloaded again.
        pause: Seconds before the second attempt; twice as long before the third.

    Raises:
        OSError: A file cannot be downloaded. The message names the files and their folder.
    """
    files = HUB_FILES if host == "hub" else OPENAI_FILES
    folder = folder or download_folder(name, host)
    with created_folder(folder):
        try:
            with lock_file(folder / ".lock"):
                _download(name, host, files, folder, mirror, on_bytes, on_damage, pause)
        except Timeout as error:
            raise OSError(
                f"download: another process is downloading into {folder}; wait for it"
            ) from error
    return folder


def _download(
    name: str,
    host: DownloadHost,
    files: Sequence[str],
    folder: Path,
    mirror: str | None,
    on_bytes: OnBytes,
    on_damage: Callable[[Path], None],
    pause: float,
) -> None:
    damaged = set(damaged_files(folder))
    recorded = _recorded_files(folder)
    valid = set(files) & recorded - damaged
    for file in files:
        if file not in valid and (folder / file).is_file():
            if file not in damaged and _is_valid(folder / file, _expected(name, host, file)):
                valid.add(file)  # a user has put it there
            else:
                damaged.add(file)
                on_damage(folder / file)
    if host == "hub" and len(valid) < len(files) and find_spec("huggingface_hub") is None:
        raise OSError(
            "download: the hub needs huggingface_hub; pip install 'gpt-lightning[hub]', or give "
            "--host openai"
        )
    try:
        for file in files:
            if file not in valid:
                expected = _expected(name, host, file)
                if host == "hub":
                    _fetch_from_hub(name, folder / file, expected, mirror, on_bytes, pause)
                else:
                    bases = [mirror.rstrip("/"), *_OPENAI] if mirror else _OPENAI
                    urls = [f"{base}/{name.removeprefix('gpt2-')}/{file}" for base in bases]
                    fetch(urls, folder / file, expected, on_bytes, pause)
                valid.add(file)
                damaged.discard(file)
                recorded.discard(file)
    except OSError as error:
        raise OSError(
            f"download: {file} of {name} cannot be downloaded ({error}); try again, or put "
            f"{', '.join(files)} into {folder}"
        ) from error
    finally:
        # while a file is damaged, the manifest keeps its old checksum, so that no command loads the file
        if valid != recorded and not damaged:
            write_manifest(folder, valid)


def _recorded_files(folder: Path) -> set[str]:
    path = folder / MANIFEST
    return set(json.loads(path.read_text(encoding="utf-8"))["files"]) if path.exists() else set()


def _is_valid(path: Path, expected: ExpectedFile) -> bool:
    """Whether a file has the expected size and checksum; without a checksum, whether it can be read."""
    if expected.size not in (None, path.stat().st_size):
        return False
    if expected.checksum is None:
        return _is_readable(path)
    return matches_checksum(path, expected.checksum)


def _is_readable(path: Path) -> bool:
    """Whether a safetensors or JSON file is complete; ``True`` for other files."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError):
        return False
    return True


def _expected(name: str, host: DownloadHost, file: str) -> ExpectedFile:
    if host == "hub":
        return _HUB[name][2] if file == "model.safetensors" else ExpectedFile()
    return _EXPECTED.get(file) or _EXPECTED_BY_SIZE.get(name, {}).get(file, ExpectedFile())


def _fetch_from_hub(
    name: str,
    path: Path,
    expected: ExpectedFile,
    mirror: str | None,
    on_bytes: OnBytes,
    pause: float,
) -> None:
    """Like :func:`fetch`, with huggingface_hub, which resumes an interrupted download itself."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # otherwise it logs every attempt
    causes = []
    for endpoint in [mirror.rstrip("/"), ENDPOINT] if mirror else [ENDPOINT]:
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(pause * 2 ** (attempt - 1))
            try:
                _fetch_from_endpoint(name, path, expected, endpoint, on_bytes)
                return
            except (
                Exception
            ) as error:  # of httpx or requests, depending on the version of huggingface_hub
                last = error
                response = getattr(error, "response", None)
                if (
                    isinstance(error, NotAvailableError)
                    or getattr(response, "status_code", 0) in NOT_AVAILABLE_STATUS
                ):
                    break
        causes.append(f"{urlsplit(endpoint).netloc}: {root_cause(last)}")
    raise OSError(", ".join(causes)) from last


def _fetch_from_endpoint(
    name: str, path: Path, expected: ExpectedFile, endpoint: str, on_bytes: OnBytes
) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    repository, revision, _ = _HUB[name]
    # first, because hf_hub_download takes long to fail without a network
    url = hf_hub_url(repository, path.name, revision=revision, endpoint=endpoint)
    metadata = get_hf_file_metadata(url, token=False)
    # the hub's ETag of a large file is its SHA-256
    etag = metadata.etag or ""
    host_checksum = f"sha256:{etag}" if re.fullmatch("[0-9a-f]{64}", etag) else None
    options: dict[str, Any] = {}
    if "tqdm_class" in signature(hf_hub_download).parameters:  # not in old versions
        options["tqdm_class"] = _progress_class(path.name, metadata.size, on_bytes)
    unfinished = path.with_name(".unfinished")
    fetched = Path(
        hf_hub_download(
            repository,
            path.name,
            revision=revision,
            local_dir=unfinished,
            endpoint=endpoint,
            token=False,
            **options,
        )
    )
    verify(fetched, expected, host_checksum)
    move_into_place(fetched, path)
    shutil.rmtree(unfinished, ignore_errors=True)


def _progress_class(name: str, size: int | None, on_bytes: OnBytes) -> type:
    """A progress bar for huggingface_hub that shows nothing and calls ``on_bytes``."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            self._bytes = settings.get("initial") or 0
            super().__init__(*args, **(settings | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            self._bytes += int(n or 0)
            on_bytes(name, self._bytes, size)
            return None

    return Bar
