"""Bad files and folders through the real commands: exit code 2, one line that helps, nothing written."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from gpt_lightning.data import corpus
from gpt_lightning.storage.cache import cache_folder
from helpers import (
    SMALL_QUICKSTART,
    Command,
    assert_refused,
    json_of,
    limited_file_size,
)


def test_bad_text_is_refused(refused_fit: Command, tmp_path: Path) -> None:
    files = {
        "empty.txt": b"",
        "blank.txt": b" \n\n ",
        "latin.txt": "Übermut tut selten gut. ".encode("latin-1") * 100,
        "short.txt": b"Only a few words, no window.",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    assert_refused(refused_fit("--data.text=empty.txt"), "data.text: empty.txt is empty")
    assert_refused(refused_fit("--data.text=blank.txt"), "data.text: blank.txt is empty")
    assert_refused(refused_fit("--data.text=latin.txt"), "latin.txt is not UTF-8")
    assert_refused(refused_fit("--data.text=folder"), "folder holds no text files")
    assert_refused(
        refused_fit("--data.text=short.txt", "--data.train_ratio=0.9"),
        "training split of short.txt has 7 tokens, one window needs 17",
    )


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_unreadable_text_is_refused(refused_fit: Command) -> None:
    assert_refused(refused_fit("--data.text=/proc/self/mem"), "/proc/self/mem cannot be read")


def test_home_folder_of_an_unknown_user_does_not_exist(command: Command) -> None:
    for arguments in (["validate", "--init_from=~nobody/run"], ["generate", "--from=~nobody/run", "--prompt=A"],
                      ["convert", "~nobody/run", "x", "--format=hf"]):  # fmt: skip
        assert_refused(command(*arguments), "~nobody/run: does not exist")


def test_file_that_is_not_a_checkpoint_is_refused(refused_fit: Command, tmp_path: Path) -> None:

    (tmp_path / "words.ckpt").write_text("no checkpoint at all")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.ckpt")
    torch.save(torch.ones(2), tmp_path / "tensor.ckpt")
    torch.save({"state_dict": Path("x"), "hyper_parameters": {}}, tmp_path / "objects.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 0.1}}, tmp_path / "foreign.ckpt")
    for name, cause in {
        "words": "is not a torch.save file",
        "empty": "is not a torch.save file",
        "other": "is not a gpt_lightning checkpoint",
        "tensor": "is not a gpt_lightning checkpoint",
        "objects": "may be code, so it is not loaded",
        "foreign": "is not a gpt_lightning checkpoint",
    }.items():
        for option in ("--ckpt_path", "--init_from"):
            assert_refused(refused_fit(f"{option}={name}.ckpt"), f"{name}.ckpt: ", cause)


def test_existing_run_is_not_overwritten(command: Command, tmp_path: Path) -> None:
    arguments = ("fit", *SMALL_QUICKSTART, "--trainer.max_steps=1")
    assert command(*arguments).code == 0
    folder = tmp_path / "checkpoints" / "quickstart"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert_refused(command(*arguments), "holds a run already", "--ckpt_path last", "--run NAME")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    (folder / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:10_000])
    assert_refused(
        command(*arguments, "--ckpt_path=last"), "last.ckpt is damaged: it has 10,000 bytes"
    )


class NotTheVerdict(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>not the text</title>")

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def wrong_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), NotTheVerdict)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/the-verdict.txt"
    server.shutdown()
    thread.join()
    server.server_close()


def test_text_with_a_wrong_checksum_is_refused(
    refused_fit: Command, wrong_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "VERDICT_URL", wrong_server)
    result = refused_fit("--data.text=verdict")
    assert_refused(result, "SHA-256 differs", str(tmp_path / "cache" / "the-verdict.txt"))
    assert not list((tmp_path / "cache").glob("*"))


def test_missing_network_is_reported(
    refused_fit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "VERDICT_URL", "http://127.0.0.1:9/the-verdict.txt")
    result = refused_fit("--data.text=verdict")
    assert_refused(result, "cannot be downloaded", f"at {tmp_path / 'cache' / 'the-verdict.txt'}")


def test_another_text_under_the_name_of_the_verdict_is_refused(
    refused_fit: Command, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "the-verdict.txt").write_text("Call me Ishmael.")
    assert_refused(refused_fit("--data.text=verdict"), "is not The Verdict", "remove it")


def test_full_disk_leaves_the_previous_checkpoint(command: Command, tmp_path: Path) -> None:
    arguments = ("fit", *SMALL_QUICKSTART)
    assert command(*arguments, "--trainer.max_steps=1").code == 0
    last = tmp_path / "checkpoints" / "quickstart" / "last.ckpt"
    before = last.read_bytes()
    with limited_file_size(1_000_000):
        result = command(*arguments, "--trainer.max_steps=2", "--ckpt_path=last")
    assert result.code == 2
    assert "Traceback" not in result.err
    assert "last.ckpt: cannot be written" in result.err or "best.ckpt: cannot" in result.err
    assert last.read_bytes() == before
    assert not list(last.parent.glob(".*"))


def test_debug_shows_the_traceback(command: Command) -> None:
    with pytest.raises(OSError, match="nowhere: does not exist"):
        command("generate", "--from=nowhere", "--prompt=x", "--debug")


def test_unwritable_folder_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    result = command("fit", *SMALL_QUICKSTART, "--trainer.max_steps=1")
    assert_refused(result, "checkpoints")
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_tilde_is_the_home_folder_in_each_path(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", "~/cache")
    for name in ("a.txt", "b.txt"):
        (home / name).write_text(f"A story of {name} that is told again and again. " * 40)
    (home / "mine.yaml").write_text(
        "trainer:\n  default_root_dir: ~/runs\n  max_steps: 1\n"
        "  logger: {class_path: CSVLogger, init_args: {save_dir: ~/logs}}\n"
        "data:\n  mixture: {~/a.txt: 1, ~/b.txt: 1}\n"
    )
    run = "~/runs/checkpoints/quickstart"
    own = ("--config=~/mine.yaml", "--data.train_ratio=0.5")
    for arguments in [
        ("fit", *SMALL_QUICKSTART, *own),
        ("fit", *SMALL_QUICKSTART, *own, f"--ckpt_path={run}/last.ckpt"),
        ("fit", *SMALL_QUICKSTART, *own, f"--init_from={run}", "--run=second"),
        ("generate", f"--from={run}", "--prompt=A", "--max_new_tokens=1"),
        ("convert", run, "~/model.pth", "--format=book"),
        ("prepare", "~/a.txt", "~/*.txt", "--out=~/corpus", "--split=ratio"),
        ("report", "sampling", "--out=~/figures"),
    ]:
        result = command(*arguments)
        assert result.code == 0, result.err
    for name in ("runs/checkpoints/second/last.ckpt", "model.pth", "corpus", "figures", "logs"):
        assert (home / name).exists(), name
    assert cache_folder() == home / "cache"
    assert "home/runs is not empty" in command("verify-resume", "--out=~/runs").err
    assert sorted(os.listdir(tmp_path)) == ["home"]


def test_missing_home_folder_is_reported(
    refused_fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(refused_fit("--data.text=~nobody-here.txt"), "~nobody-here.txt does not exist")
    monkeypatch.delenv("GPT_LIGHTNING_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert_refused(refused_fit("--data.text=verdict"), "GPT_LIGHTNING_CACHE", "no home folder")


def test_tilde_is_the_home_folder_in_lists_of_paths(
    command: Command, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "p.txt").write_text("The clock", encoding="utf-8")
    (home / "mine.yaml").write_text("max_new_tokens: 0", encoding="utf-8")
    base = ("generate", f"--from={trained_run}", "--json", "--config=~/mine.yaml")
    assert json_of(command(*base, "--prompt_file=~/p.txt"))["text"] == "The clock"
    json_of(command("report", "sampling", "--out=~/figures", "--json"))
    assert (home / "figures" / "sampling.png").exists()
    assert not (tmp_path / "~").exists()
