"""The folders and files of GPT-2's public weights in the cache. Reading them needs no HTTP library."""

from pathlib import Path
from typing import Literal

from gpt_lightning.storage.cache import cache_folder

DownloadHost = Literal["hub", "openai"]
HUB_FILES = ("config.json", "model.safetensors")
OPENAI_DATA = "model.ckpt.data-00000-of-00001"
OPENAI_INDEX = "model.ckpt.index"
OPENAI_META = "model.ckpt.meta"
OPENAI_FILES = (
    "checkpoint",
    "encoder.json",
    "hparams.json",
    OPENAI_DATA,
    OPENAI_INDEX,
    OPENAI_META,
    "vocab.bpe",
)


def download_folder(name: str, host: DownloadHost) -> Path:
    """The cache folder for the files of a size. A user may also put the files there."""
    return cache_folder() / name / host


def find_downloaded(name: str) -> Path:
    """The folder with the complete files of a size, from either host.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    required: dict[DownloadHost, tuple[str, ...]] = {
        "hub": HUB_FILES,
        "openai": ("hparams.json", OPENAI_DATA, OPENAI_INDEX),
    }
    for host, files in required.items():
        folder = download_folder(name, host)
        if all((folder / file).is_file() for file in files):
            return folder
    raise FileNotFoundError(
        f"{name}: is not downloaded; run python -m gpt_lightning download {name}, or put "
        f"{' and '.join(HUB_FILES)} into {download_folder(name, 'hub')}"
    )
