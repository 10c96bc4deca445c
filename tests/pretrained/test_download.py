"""``download``: OpenAI's files and the hub's, verified, completed, named in errors."""

import hashlib
import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import safetensors.torch
import torch
from filelock import FileLock

from faulty_host import FaultyHost, noise, visible
from gpt_lightning.data.tokenizer import vocabulary_file
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.pretrained import download as module
from gpt_lightning.pretrained.download import ExpectedFile, download
from gpt_lightning.pretrained.downloaded import (
    HUB_FILES,
    OPENAI_FILES,
    download_folder,
    find_downloaded,
)
from gpt_lightning.storage import http_download
from helpers import Command, assert_refused, python

DATA = "model.ckpt.data-00000-of-00001"


POINTER = b'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'


def openai_files(size: str) -> dict[str, bytes]:
    """Files that are as small as possible, except the two whose checksums are known."""
    files = {
        name: f"{size} {name} ".encode() * 20
        for name in ("hparams.json", DATA, "model.ckpt.index", "model.ckpt.meta")
    }
    files["checkpoint"] = POINTER
    files["hparams.json"] = b'{"n_layer": 12}'
    for name in ("encoder.json", "vocab.bpe"):
        files[name] = Path(vocabulary_file(name)).read_bytes()
    return files


def serve_openai(host: FaultyHost, name: str) -> dict[str, bytes]:
    size = name.removeprefix("gpt2-")
    files = openai_files(size)
    host.files |= {f"/{size}/{file}": body for file, body in files.items()}
    return files


def test_two_processes_do_not_download_into_one_folder(host: FaultyHost, tmp_path: Path) -> None:
    serve_openai(host, "gpt2-774M")
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(OSError, match="another process is downloading"),
    ):
        download("gpt2-774M", "openai", folder=tmp_path, mirror=host.url, pause=0.0)
    download("gpt2-774M", "openai", folder=tmp_path, mirror=host.url, pause=0.0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".lock")]


def serve_hub(host: FaultyHost, name: str, weights: bytes) -> tuple[str, str]:
    """Let ``host`` have the two files of the hub, and return their paths."""
    repository, revision, _ = module._HUB[name]
    config, model = (f"/{repository}/resolve/{revision}/{file}" for file in HUB_FILES)
    host.files |= {config: b'{"n_layer": 12}', model: weights}
    return config, model


def test_a_truncated_file_from_the_user_is_downloaded(host: FaultyHost) -> None:
    weights = safetensors.torch.save({"a": torch.ones(100)})
    serve_hub(host, "gpt2-774M", weights)
    folder = download_folder("gpt2-774M", "hub")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights[:-7])
    (folder / "config.json").write_bytes(b"{")
    damaged: list[str] = []
    download("gpt2-774M", mirror=host.url, pause=0.0, on_damage=lambda p: damaged.append(p.name))
    assert damaged == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("name", ["gpt2-774M", "gpt2-1558M"])
def test_openai_files(command: Command, host: FaultyHost, name: str) -> None:
    files = serve_openai(host, name)
    result = command("download", name, "--host=openai", f"--mirror={host.url}/", "--json")
    assert result.code == 0, result.err
    folder = download_folder(name, "openai")
    assert json.loads(result.out) == {
        "name": name,
        "folder": str(folder),
        "files": {n: (folder / n).stat().st_size for n in [*OPENAI_FILES, "manifest.json"]},
    }
    assert {n: (folder / n).read_bytes() for n in OPENAI_FILES} == files
    assert find_downloaded(name) == folder


@pytest.mark.parametrize("name", ["gpt2-124M", "gpt2-355M"])
def test_openai_files_of_a_wrong_size_are_refused(
    command: Command, host: FaultyHost, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size is verified before the download."""
    monkeypatch.setattr(http_download.time, "sleep", lambda _: None)
    serve_openai(host, name)
    result = command("download", name, "--host=openai", f"--mirror={host.url}")
    assert_refused(
        result,
        "hparams.json of",
        "has a file of ",
        " bytes, not 9",
        str(download_folder(name, "openai")),
    )
    assert "hparams.json" not in visible(download_folder(name, "openai"))


def test_a_file_from_the_user_is_verified_against_the_known_checksum(
    host: FaultyHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = serve_openai(host, "gpt2-124M")
    monkeypatch.setattr(module, "_EXPECTED_BY_SIZE", {})
    md5 = hashlib.md5(files[DATA]).hexdigest()
    expected = {DATA: ExpectedFile(len(files[DATA]), f"md5:{md5}")}
    monkeypatch.setattr(module, "_EXPECTED_BY_SIZE", {"gpt2-124M": expected})
    download("gpt2-124M", "openai", mirror=host.url, pause=0.0)
    host.requests.clear()
    # without a manifest, the known checksum counts
    folder = download_folder("gpt2-124M", "openai")
    (folder / "manifest.json").unlink()
    (folder / DATA).write_bytes(files[DATA][:-1] + b"?")
    download("gpt2-124M", "openai", mirror=host.url, pause=0.0)
    assert host.requests == [("GET", f"/124M/{DATA}", None)]
    assert (folder / DATA).read_bytes() == files[DATA]


def test_second_run_downloads_missing_and_damaged_files(command: Command, host: FaultyHost) -> None:
    files = serve_openai(host, "gpt2-774M")
    arguments = ("download", "gpt2-774M", "--host=openai", f"--mirror={host.url}")
    assert command(*arguments).code == 0
    folder = download_folder("gpt2-774M", "openai")
    manifest = (folder / "manifest.json").read_bytes()
    host.requests.clear()
    result = command(*arguments)
    assert (result.code, result.out, result.err) == (0, f"{folder}\n", "")
    assert host.requests == []

    flipped = bytearray(files["model.ckpt.meta"])
    flipped[5] ^= 1
    (folder / "model.ckpt.meta").write_bytes(flipped)
    (folder / "hparams.json").unlink()
    result = command(*arguments)
    assert result.code == 0, result.err
    assert result.err == f"{folder / 'model.ckpt.meta'}: is damaged; downloading it again\n"
    assert [path for _, path, _ in host.requests] == ["/774M/hparams.json", "/774M/model.ckpt.meta"]
    assert {n: (folder / n).read_bytes() for n in OPENAI_FILES} == files
    assert (folder / "manifest.json").read_bytes() == manifest


def test_manifest_keeps_the_checksum_of_a_damaged_file(host: FaultyHost, nowhere: str) -> None:
    serve_openai(host, "gpt2-774M")
    folder = download("gpt2-774M", "openai", mirror=host.url)
    manifest = (folder / "manifest.json").read_bytes()
    (folder / DATA).write_bytes(b"x")
    for _ in range(2):
        with pytest.raises(OSError, match=f"{DATA} of gpt2-774M cannot be downloaded"):
            download("gpt2-774M", "openai", mirror=nowhere, pause=0.0)
    assert (folder / "manifest.json").read_bytes() == manifest


def test_manifest_has_the_files_before_a_failure(host: FaultyHost) -> None:
    serve_openai(host, "gpt2-774M")
    del host.files[f"/774M/{DATA}"]
    with pytest.raises(OSError, match="404 Not Found"):
        download("gpt2-774M", "openai", mirror=host.url, pause=0.0)
    folder = download_folder("gpt2-774M", "openai")
    recorded = json.loads((folder / "manifest.json").read_text())["files"].keys()
    assert recorded == {"checkpoint", "encoder.json", "hparams.json"}
    with pytest.raises(FileNotFoundError, match="download gpt2-774M"):
        find_downloaded("gpt2-774M")


needs_hub = pytest.mark.skipif(
    find_spec("huggingface_hub") is None,
    reason="huggingface_hub is not installed: pip install '.[hub]'",
)


@needs_hub
def test_hub_files(command: Command, host: FaultyHost, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = noise(100_000)
    config, model = serve_hub(host, "gpt2-355M", weights)
    host.faults[model] = ["cut"]
    folder = download_folder("gpt2-355M", "hub")
    host.watched = folder / "model.safetensors"
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    result = command("download", "gpt2-355M", f"--mirror={host.url}")
    assert (result.code, result.out, result.err) == (0, f"{folder}\n", "")
    assert {path.name for path in folder.iterdir()} == {*HUB_FILES, "manifest.json"}
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "config.json").read_bytes() == host.files[config]
    assert host.ranges(model) == [None, "bytes=50000-"]
    assert find_downloaded("gpt2-355M") == folder

    host.requests.clear()
    assert command("download", "gpt2-355M").code == 0
    assert host.requests == []


@needs_hub
def test_hub_download_reports_progress(host: FaultyHost) -> None:
    _, model = serve_hub(host, "gpt2-774M", noise(100_000))
    host.faults[model] = ["503", "flip"]  # found by the ETag
    progress: list[tuple[str, int, int | None]] = []
    folder = download(
        "gpt2-774M", mirror=host.url, on_bytes=lambda *args: progress.append(args), pause=0.0
    )
    assert progress[-1] == ("model.safetensors", 100_000, 100_000)
    assert (folder / "model.safetensors").read_bytes() == noise(100_000)


@needs_hub
@pytest.mark.parametrize(
    ("faults", "cause"),
    [
        (["404"], "404"),
        (["503"] * 9, "503"),
        (["html"] * 9, "should be of size"),
        (["flip"] * 9, "does not match its checksum sha256:"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_hub_file_that_is_wrong_is_refused(
    host: FaultyHost, faults: list[str], cause: str, nowhere: str
) -> None:
    _, model = serve_hub(host, "gpt2-774M", noise(10_000))
    host.faults[model] = faults
    with pytest.raises(OSError, match=cause) as caught:
        download("gpt2-774M", mirror=host.url, pause=0.0)
    assert nowhere.removeprefix("http://") in str(caught.value)  # the hub itself was tried next
    assert visible(download_folder("gpt2-774M", "hub")) == {"config.json", "manifest.json"}


@needs_hub
@pytest.mark.parametrize("name", ["gpt2-124M", "gpt2-1558M"])
def test_hub_files_are_verified_against_known_checksums(host: FaultyHost, name: str) -> None:
    serve_hub(host, name, noise(10_000))
    with pytest.raises(OSError, match=r"548,105,171|does not match its checksum sha256:0f8b28eb"):
        download(name, mirror=host.url, pause=0.0)
    assert "model.safetensors" not in visible(download_folder(name, "hub"))


@needs_hub
def test_a_web_page_is_refused_as_config(host: FaultyHost) -> None:
    config, _ = serve_hub(host, "gpt2-774M", noise(100))
    host.files[config] = b"<html>sign in</html>"
    with pytest.raises(OSError, match=r"config\.json of gpt2-774M .* a web page"):
        download("gpt2-774M", mirror=host.url, pause=0.0)


@pytest.mark.parametrize("source", ["openai", pytest.param("hub", marks=needs_hub)])
@pytest.mark.parametrize("name", GPT2_SIZES)
def test_without_network_the_error_names_files_and_folder(
    command: Command, name: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_download.time, "sleep", lambda _: None)
    files = HUB_FILES if source == "hub" else OPENAI_FILES
    result = command("download", name, f"--host={source}")
    folder = download_folder(name, "hub" if source == "hub" else "openai")
    assert_refused(
        result,
        f"of {name} cannot be downloaded",
        "refused",
        f"put {', '.join(files)} into {folder}",
    )
    assert not folder.exists()


@pytest.mark.parametrize("source", ["openai", pytest.param("hub", marks=needs_hub)])
def test_failed_download_leaves_no_new_folder(
    command: Command, source: str, monkeypatch: pytest.MonkeyPatch, nowhere: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(http_download.time, "sleep", lambda _: None)
    result = command(
        "download", "gpt2-124M", f"--host={source}", f"--mirror={nowhere}", "--out=a/b"
    )
    assert_refused(result, "cannot be downloaded")
    assert not visible(tmp_path)


def test_without_huggingface_hub(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert_refused(command("download", "gpt2-124M"), "gpt-lightning[hub]", "--host openai")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("124M", "did you mean gpt2-124M?"),
        ("gpt2-1.5B", "did you mean gpt2-1558M?"),
        ("gpt2-meduim", "did you mean gpt2-medium?"),
        ("phi", "give one of gpt2-124M, gpt2-355M, gpt2-774M, gpt2-1558M"),
    ],
)
def test_unknown_size_is_refused(command: Command, tmp_path: Path, name: str, near: str) -> None:
    assert_refused(
        command("download", name), f"{name}: is neither a size of GPT-2 nor a task", near
    )
    assert os.listdir(tmp_path) == []


def test_unknown_host_is_refused(command: Command) -> None:
    assert_refused(command("download", "gpt2-124M", "--host=torrent"), "host", "torrent")


def test_out_is_the_folder_of_the_files(command: Command, host: FaultyHost, tmp_path: Path) -> None:
    files = serve_openai(host, "gpt2-774M")
    result = command("download", "gpt2-774M", "--host=openai", f"--mirror={host.url}", "--out=x")
    assert (result.code, result.out) == (0, "x\n"), result.err
    assert visible(tmp_path / "x") == {*files, "manifest.json"}
    assert not (tmp_path / "cache").exists()


def test_source_that_is_not_downloaded_names_the_command(command: Command) -> None:
    result = command("generate", "--from=gpt2-355M", "--prompt=a")
    assert_refused(
        result, "gpt_lightning download gpt2-355M", str(download_folder("gpt2-355M", "hub"))
    )
    assert "config.json and model.safetensors" in result.err


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("gpt2", "gpt2-124M"),
        ("gpt2-small", "gpt2-124M"),
        ("openai-community/gpt2", "gpt2-124M"),
        ("gpt2-medium", "gpt2-355M"),
        ("gpt2-large", "gpt2-774M"),
        ("gpt2-xl", "gpt2-1558M"),
    ],
)
def test_alias_of_a_size_works_everywhere(
    command: Command, name: str, size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(http_download.time, "sleep", lambda _: None)
    assert_refused(command("download", name, "--host=openai"), f"of {size} cannot be downloaded")
    for arguments in (
        ["generate", f"--from={name}", "--prompt=a"],
        ["validate", f"--init_from={name}"],
        ["convert", name, "x.ckpt", "--format=lightning"],
        ["report", "sizes", "--from", name, "--prompt=a"],
    ):
        assert_refused(command(*arguments), f"run python -m gpt_lightning download {size}")
    width = GPT2_SIZES[size].emb_dim
    result = command(
        "plan", f"--init_from={name}", "--data.text=sample", "--model.config.emb_dim=8"
    )
    assert_refused(result, f"model.config.emb_dim is {width} there and 8 here")
    # a folder or file with that name has priority
    (tmp_path / name).mkdir(parents=True)
    assert_refused(
        command("generate", f"--from={name}", "--prompt=a"), f"or {size} for the downloaded"
    )
    (tmp_path / name).rmdir()
    (tmp_path / f"{name}.ckpt").write_bytes(b"")
    assert_refused(
        command("generate", f"--from={name}", "--prompt=a"),
        f"{name}.ckpt: is not a torch.save file",
    )


def test_help_imports_neither_torch_nor_lightning() -> None:
    code = "from gpt_lightning.cli.main import main\nmain(['download', '--help'])"
    result = python("-c", f"import sys\n{code}\nsys.stderr.write(' '.join(sys.modules))")
    assert "--mirror" in result.stdout
    loaded = set(result.stderr.split())
    assert not {"torch", "lightning", "tensorflow", "requests", "huggingface_hub"} & loaded
    result = python(
        "-c",
        "import sys, gpt_lightning.pretrained.download; sys.stderr.write(' '.join(sys.modules))",
    )
    assert not {"torch", "lightning", "tensorflow"} & set(result.stderr.split())
