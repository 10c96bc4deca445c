"""``download`` of the tasks' files, and tasks that find them."""

import hashlib
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from faulty_host import FaultyHost, visible
from gpt_lightning.evals import task_downloads
from gpt_lightning.storage import http_download
from gpt_lightning.storage.http_download import ExpectedFile
from helpers import Command, assert_refused, json_of
from servers import write_tiny_model
from task_examples import write_tasks

NAMES = {"hellaswag": "hellaswag", "lambada": "lambada", "wikitext": "wikitext-2"}


def zipped(member: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("other.txt", b"other")
        archive.writestr(member, content)
    return buffer.getvalue()


@pytest.fixture
def official(
    host: FaultyHost, nowhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, bytes]:
    """Small files in place of the official ones: on the host, and as what is expected."""
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(http_download.time, "sleep", lambda _: None)
    monkeypatch.setattr(http_download, "_CHUNK_BYTES", 1000)
    (tmp_path / "made").mkdir()
    contents = {}
    for task, path in write_tasks(tmp_path / "made", copies=40).items():
        download = task_downloads.TASK_DOWNLOADS[task]
        content = source = Path(path).read_bytes()
        if download.member is not None:
            source = zipped(download.member, content)
        sha256, of_source = (hashlib.sha256(each).hexdigest() for each in (content, source))
        assert download.expected.checksum
        expected = ExpectedFile(len(source), f"sha256:{of_source}")
        bases = (nowhere, host.url)
        made = replace(download, sha256=sha256, bases=bases, expected=expected)
        monkeypatch.setitem(task_downloads.TASK_DOWNLOADS, task, made)
        host.files[f"/{download.source}"] = source
        contents[download.file] = content
    return contents


@pytest.mark.parametrize("task", NAMES)
def test_downloaded_file_is_used(
    command: Command, official: dict[str, bytes], tmp_path: Path, task: str
) -> None:
    source = str(write_tiny_model(tmp_path / "tiny", context_length=16))
    evaluate = ("evaluate", f"--from={source}", f"--task={task}", "--json")
    assert_refused(command(*evaluate), f"run python -m gpt_lightning download {NAMES[task]}")
    file = task_downloads.TASK_DOWNLOADS[task].file
    answer = json_of(command("download", NAMES[task], "--json"))
    folder = tmp_path / "cache" / "tasks" / NAMES[task]
    assert answer == {"name": NAMES[task], "folder": str(folder), "files": {file: len(official[file])}}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {file}
    (tmp_path / "same").write_bytes(official[file])
    result = json_of(command(*evaluate))
    assert result.pop("settings")["file"] == str(folder / file)
    expected = json_of(command(*evaluate, "--file=same"))
    assert result == {key: value for key, value in expected.items() if key != "settings"}

    (folder / file).write_bytes(official[file][:-1])
    assert_refused(command(*evaluate), f"{folder / file}: is not the official file", "download")
    again = command("download", NAMES[task])
    assert again.out.strip() == str(folder)
    assert f"{folder / file}: is damaged; downloading it again" in again.err
    assert (folder / file).read_bytes() == official[file]


@pytest.mark.usefixtures("official")
def test_interrupted_download_of_a_task_resumes(command: Command, host: FaultyHost) -> None:
    path = "/hellaswag_val.jsonl"
    host.faults[path] = ["cut", "503", "503", "503"]
    result = command("download", "hellaswag")
    assert_refused(result, "hellaswag_val.jsonl cannot be downloaded", "503 Service", "put it into")
    host.requests.clear()
    assert command("download", "hellaswag").code == 0
    (byte_range,) = host.ranges(path)
    assert byte_range is not None
    assert byte_range.startswith("bytes=")
    host.requests.clear()
    assert command("download", "hellaswag").code == 0  # it is there and intact
    assert host.requests == []


@pytest.mark.usefixtures("official")
@pytest.mark.parametrize("name", NAMES.values())
@pytest.mark.parametrize("fault", ["flip", "404", "html"])
def test_wrong_file_of_a_task_is_refused(
    command: Command, host: FaultyHost, tmp_path: Path, name: str, fault: str
) -> None:
    for path in host.files:
        host.faults[path] = [fault] * 9
    out = tmp_path / "here"
    assert_refused(command("download", name, f"--out={out}"), "cannot be downloaded", str(out))
    assert not out.exists() or visible(out) == set()


def test_file_from_the_user_and_a_mirror(
    command: Command, official: dict[str, bytes], host: FaultyHost, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "tasks" / "lambada"
    folder.mkdir(parents=True)
    (folder / "lambada_test.jsonl").write_bytes(official["lambada_test.jsonl"])
    assert command("download", "lambada").code == 0
    assert host.requests == []
    host.files["/mirror/wikitext-2-raw-v1.zip"] = host.files["/wikitext-2-raw-v1.zip"]
    assert command("download", "wikitext-2", f"--mirror={host.url}/mirror/", "--out=w").code == 0
    assert visible(tmp_path / "w") == {"wiki.test.raw"}
    assert {path for _, path, _ in host.requests} == {"/mirror/wikitext-2-raw-v1.zip"}


@pytest.mark.usefixtures("official")
def test_archive_without_the_file_is_refused(
    command: Command, host: FaultyHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content, cause in (
        (zipped("another", b"x"), "no item named"),
        (b"no archive", "not a zip"),
    ):
        sha256 = hashlib.sha256(content).hexdigest()
        host.files["/wikitext-2-raw-v1.zip"] = content
        download = task_downloads.TASK_DOWNLOADS["wikitext"]
        made = replace(download, expected=ExpectedFile(None, f"sha256:{sha256}"))
        monkeypatch.setitem(task_downloads.TASK_DOWNLOADS, "wikitext", made)
        assert_refused(command("download", "wikitext-2"), "wiki.test.raw cannot", cause)


@pytest.mark.usefixtures("official")
def test_bad_download_of_a_task_is_refused(command: Command, tmp_path: Path) -> None:
    assert_refused(
        command("download", "wikitext"), "wikitext: is neither", "did you mean wikitext-2?"
    )
    assert_refused(
        command("download", "hellaswag", "--host=openai"), "host: openai has only weights"
    )
    (tmp_path / "held").mkdir()
    with FileLock(tmp_path / "held" / ".lock"):
        refused = command("download", "lambada", "--out=held")
    assert_refused(refused, "another process is downloading")


@pytest.mark.network
@pytest.mark.parametrize("name", NAMES.values())
def test_official_files_have_their_checksums(command: Command, tmp_path: Path, name: str) -> None:
    files = json.loads(command("download", name, f"--out={tmp_path}", "--json").out)["files"]
    assert len(files) == 1
