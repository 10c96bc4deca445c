"""A user's mistakes through the real command: exit code 2, one line that helps, nothing written."""

import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, Command, Done, python

from gpt_lightning.data import corpus

QUICKSTART = f"--config={ROOT}/configs/quickstart.yaml"


def refused(done: Done, *parts: str) -> None:
    assert done.code == 2, done.err
    assert done.out == ""
    assert done.err.startswith("gpt_lightning: error: ")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    for part in parts:
        assert part in done.err


@pytest.fixture
def refused_fit(command: Command, tmp_path: Path) -> Iterator[Command]:
    """``fit`` on a small setting; whatever it was refused for, it left no run behind."""

    def run(*arguments: str) -> Done:
        return command("fit", QUICKSTART, *SMALL, "--trainer.max_steps=1", *arguments)

    yield run
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model.config.emb_dim=15"], ["emb_dim: 15 is not divisible by n_heads 2"]),
        (["--model.config.n_layers=0"], ["n_layers: 0"]),
        (["--model.config.context_length=-4"], ["context_length: -4"]),
        (["--model.config.emb_dim=abc"], ["model.config.emb_dim", "abc"]),
        (["--model.config.drop_rate=1"], ["drop_rate: 1.0 is outside [0, 1)"]),
        (["--model.config.vocab_size=300"], ["vocab_size: 300", "50257"]),
        (["--trainer.reload_dataloaders_every_n_epochs=1"], ["reload_dataloaders_every_n_epochs"]),
        (["--model.lr=-1"], ["model.lr: -1.0"]),
        (["--model.betas=[1.5,0.9]"], ["model.betas: (1.5, 0.9)"]),
        (["--model.warmup_steps=-1"], ["model.warmup_steps: -1"]),
        (["--model.decay_steps=5"], ["model.decay_steps: 5 is not after the 10 warmup_steps"]),
        (["--model.min_lr=5"], ["model.min_lr: 5.0 is above model.lr"]),
        (["--data.context_length=17"], ["data.context_length: 17 is more than the model's 16"]),
        (["--trainer.accelerator=gpu"], ["trainer: "]),
        (["--data.batch_size=0"], ["data.batch_size: 0"]),
        (["--data.batch_size=5000"], ["data.batch_size: 5000", "training windows"]),
        (["--data.stride=0"], ["data.stride: 0"]),
        (["--data.train_ratio=1.5"], ["data.train_ratio: 1.5"]),
        (["--data.train_ratio=1.0"], ["data.train_ratio: 1.0"]),
        (["--data.train_ratio=0.99999"], ["validation split", "tokens, one window needs 17"]),
        (["--evaluation.eval_freq=0"], ["evaluation.eval_freq: 0"]),
        (["--evaluation.eval_iter=0"], ["evaluation.eval_iter: 0"]),
        (["--evaluation.prompt="], ["evaluation.prompt: is empty"]),
        (["--checkpoint.every_n_train_steps=0"], ["checkpoint.every_n_train_steps: 0"]),
        (["--model.lrr=1"], ["model.lrr", "did you mean model.lr?"]),
        (["--data.tekst=x"], ["did you mean data.text?"]),
        (["--rng=dice"], ["rng"]),
        (["--seed_everything=yes"], ["seed_everything"]),
        (["--run=../elsewhere"], ["run: ../elsewhere"]),
        (["--run="], ["run: "]),
        (["--ckpt_path=last"], ["ckpt_path", "last.ckpt"]),
        (["--ckpt_path=nowhere.ckpt"], ["nowhere.ckpt: does not exist"]),
        (["--init_from=nowhere"], ["nowhere: does not exist"]),
        (["--config=nowhere.yaml"], ["nowhere.yaml"]),
        (["--trainer.max_epochs=two"], ["trainer.max_epochs", "two"]),
        (["--data.text=nowhere.txt"], ["data.text: nowhere.txt does not exist"]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) and value[0].startswith("-") else "",
)
def test_settings(refused_fit: Command, arguments: list[str], parts: list[str]) -> None:
    refused(refused_fit(*arguments), *parts)


def test_texts(refused_fit: Command, tmp_path: Path) -> None:
    files = {
        "empty.txt": b"",
        "blank.txt": b" \n\n ",
        "latin.txt": "Übermut tut selten gut. ".encode("latin-1") * 100,
        "short.txt": b"Only a few words, no window.",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    refused(refused_fit("--data.text=empty.txt"), "data.text: empty.txt is empty")
    refused(refused_fit("--data.text=blank.txt"), "data.text: blank.txt is empty")
    refused(refused_fit("--data.text=latin.txt"), "latin.txt is not UTF-8")
    refused(refused_fit("--data.text=folder"), "folder holds no text files")
    refused(
        refused_fit("--data.text=short.txt", "--data.train_ratio=0.9"),
        "training split of short.txt has 7 tokens, one window needs 17",
    )


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_unreadable_file(refused_fit: Command) -> None:
    refused(refused_fit("--data.text=/proc/self/mem"), "/proc/self/mem cannot be read")


def test_unknown_keys_in_yaml(refused_fit: Command, tmp_path: Path) -> None:
    for text, near in [
        ("model:\n  config:\n    emb_dimm: 8\n", "did you mean model.config.emb_dim?"),
        ("evaluation:\n  eval_frequ: 8\n", "did you mean evaluation.eval_freq?"),
        ("modell:\n  lr: 8\n", "did you mean model.lr?"),
        ("seed_everythin: 8\n", "did you mean seed_everything?"),
    ]:
        (tmp_path / "mine.yaml").write_text(text)
        refused(refused_fit("--config=mine.yaml"), near)


def test_yaml_that_is_none(refused_fit: Command, tmp_path: Path) -> None:
    for content in (b"{", b"- 1\n- 2\n", b"\xff\xfe\x00", b"just words"):
        (tmp_path / "mine.yaml").write_bytes(content)
        refused(refused_fit("--config=mine.yaml"))


@pytest.mark.parametrize(
    "yaml",
    [
        "trainer:\n  callbacks:\n  - class_path: evil.Canary\n",
        "trainer:\n  logger:\n    class_path: evil.Canary\n",
        "trainer:\n  callbacks:\n  - class_path: lightning.pytorch.callbacks.LambdaCallback\n"
        "    init_args:\n      on_fit_start: os.system\n",
    ],
)
def test_class_paths_from_elsewhere_are_not_imported(
    refused_fit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yaml: str
) -> None:
    (tmp_path / "evil.py").write_text("open('canary', 'w').close()\nclass Canary: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml)
    refused(refused_fit("--config=mine.yaml"), "is not imported from a configuration")
    assert not (tmp_path / "canary").exists()


def test_no_checkpoint(refused_fit: Command, tmp_path: Path) -> None:
    import torch

    (tmp_path / "words.ckpt").write_text("no checkpoint at all")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.ckpt")
    torch.save(torch.ones(2), tmp_path / "tensor.ckpt")
    torch.save({"state_dict": Path("x"), "hyper_parameters": {}}, tmp_path / "objects.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 0.1}}, tmp_path / "foreign.ckpt")
    for name, cause in {
        "words": "is no file of torch.save",
        "empty": "is no file of torch.save",
        "other": "is no checkpoint",
        "tensor": "is no checkpoint",
        "objects": "may be code; it is not loaded",
        "foreign": "is no checkpoint",
    }.items():
        for option in ("--ckpt_path", "--init_from"):
            refused(refused_fit(f"{option}={name}.ckpt"), f"{name}.ckpt: ", cause)


def test_a_run_in_the_folder_is_not_overwritten(command: Command, tmp_path: Path) -> None:
    arguments = ("fit", QUICKSTART, *SMALL, "--trainer.max_steps=1")
    assert command(*arguments).code == 0
    folder = tmp_path / "checkpoints" / "quickstart"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    refused(command(*arguments), "holds a run already", "--ckpt_path last", "--run NAME")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    (folder / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:10_000])
    refused(command(*arguments, "--ckpt_path=last"), "last.ckpt is damaged: it has 10,000 bytes")


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


def test_download_with_a_wrong_sum(
    refused_fit: Command, wrong_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "VERDICT_URL", wrong_server)
    done = refused_fit("--data.text=verdict")
    refused(done, "SHA-256 differs", str(tmp_path / "cache" / "the-verdict.txt"))
    assert not list((tmp_path / "cache").glob("*"))


def test_no_network(refused_fit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "VERDICT_URL", "http://127.0.0.1:9/the-verdict.txt")
    done = refused_fit("--data.text=verdict")
    refused(done, "cannot be downloaded", f"at {tmp_path / 'cache' / 'the-verdict.txt'}")


def test_another_text_in_the_verdicts_place(refused_fit: Command, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "the-verdict.txt").write_text("Call me Ishmael.")
    refused(refused_fit("--data.text=verdict"), "is not The Verdict", "remove it")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gpt_lightning.cli import main

    folder = tmp_path_factory.mktemp("trained")
    root = f"--trainer.default_root_dir={folder}"
    assert main(["fit", QUICKSTART, *SMALL, "--trainer.max_steps=1", root]) == 0
    return folder / "checkpoints" / "quickstart"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prompt="], ["prompt: is empty"]),
        ([], ["prompt: is empty"]),
        (["--prompt=x", "--temperature=-1"], ["temperature: -1.0"]),
        (["--prompt=x", "--temperature=nan"], ["temperature", "nan"]),
        (["--prompt=x", "--top_k=0"], ["top_k: 0"]),
        (["--prompt=x", "--top_k=60000"], ["top_k: 60000", "50257"]),
        (["--prompt=x", "--max_new_tokens=-1"], ["max_new_tokens: -1"]),
        (["--prompt=x", "--promt=y"], ["did you mean prompt?"]),
        (["--prompt=x", "--device=warp"], ["device: warp"]),
        (["--prompt=x", "--stream=true", "--top_k=60000"], ["top_k: 60000", "50257"]),
        (["--prompt=x", "--stream=true", "--stop="], ["stop: is empty"]),
        (["--prompt=x", "--seed=99999999999999999999"], ["seed: ", "64 bits"]),
        (["--prompt=x", "--max_new_tokens=1000000000000"], ["max_new_tokens: 1000000000000"]),
    ],
)
def test_generate(command: Command, trained: Path, arguments: list[str], parts: list[str]) -> None:
    refused(command("generate", f"--from={trained}", *arguments), *parts)


def test_generate_from_what_is_no_model(command: Command, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "config.yaml", tmp_path / "config.yaml")
    refused(command("generate", "--from=config.yaml", "--prompt=x"), "is no file of torch.save")
    refused(command("generate", f"--from={tmp_path}", "--prompt=x"), "last.ckpt")
    refused(command("generate", "--prompt=x"), "--from SOURCE")


def test_full_disk_leaves_the_checkpoint_before(command: Command, tmp_path: Path) -> None:
    arguments = ("fit", QUICKSTART, *SMALL)
    assert command(*arguments, "--trainer.max_steps=1").code == 0
    last = tmp_path / "checkpoints" / "quickstart" / "last.ckpt"
    before = last.read_bytes()
    limited = (
        "import resource, sys; from gpt_lightning.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)); sys.exit(main(sys.argv[1:]))"
    )
    more = ("--trainer.max_steps=2", "--ckpt_path=last")
    done = python("-c", limited, *arguments, *more, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "last.ckpt: cannot be written" in done.stderr or "best.ckpt: cannot" in done.stderr
    assert last.read_bytes() == before
    assert not list(last.parent.glob(".*"))


def test_unknown_command(command: Command) -> None:
    refused(command("trian"), "trian: is no command")
    refused(command("fitt"), "did you mean fit?")


def test_debug_shows_the_traceback(command: Command) -> None:
    with pytest.raises(OSError, match="nowhere: does not exist"):
        command("generate", "--from=nowhere", "--prompt=x", "--debug")


def test_unwritable_folder(command: Command, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    done = command("fit", QUICKSTART, *SMALL, "--trainer.max_steps=1")
    refused(done, "checkpoints")
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_home_folder_wherever_a_path_is_read(
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
        "data:\n  mixture: {~/a.txt: 1, ~/b.txt: 1}\n"
    )
    run = "~/runs/checkpoints/quickstart"
    own = ("--config=~/mine.yaml", "--data.train_ratio=0.5")
    for arguments in [
        ("fit", QUICKSTART, *SMALL, *own),
        ("fit", QUICKSTART, *SMALL, *own, f"--ckpt_path={run}/last.ckpt"),
        ("fit", QUICKSTART, *SMALL, *own, f"--init_from={run}", "--run=second"),
        ("generate", f"--from={run}", "--prompt=A", "--max_new_tokens=1"),
        ("convert", run, "~/model.pth", "--format=book"),
        ("prepare", "~/a.txt", "~/*.txt", "--out=~/corpus", "--split=ratio"),
        ("report", "sampling", "--out=~/figures"),
    ]:
        done = command(*arguments)
        assert done.code == 0, done.err
    for name in ("runs/checkpoints/second/last.ckpt", "model.pth", "corpus", "figures"):
        assert (home / name).exists(), name
    assert corpus.cache_folder() == home / "cache"
    assert "home/runs is not empty" in command("verify-resume", "--out=~/runs").err
    assert sorted(os.listdir(tmp_path)) == ["home"]


def test_home_folder_of_nobody(refused_fit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(refused_fit("--data.text=~nobody-here.txt"), "~nobody-here.txt does not exist")
    monkeypatch.delenv("GPT_LIGHTNING_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    refused(refused_fit("--data.text=verdict"), "GPT_LIGHTNING_CACHE", "no home folder")
