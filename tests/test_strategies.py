"""DDP and FSDP2 on two CPU processes: one process's losses, checkpoints for any number of them, no rank that waits."""

import csv
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, SMALL, Command, python
from lightning.pytorch import Callback

from gpt_lightning.data.dataloader import ResumableDataLoader
from gpt_lightning.data.dataset import WindowDataset
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.optimizer import global_grad_norm

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
DDP = (f"--config={ROOT}/configs/ddp.yaml", "--trainer.devices=2")
FSDP = (f"--config={ROOT}/configs/fsdp.yaml", "--trainer.devices=2", "--trainer.precision=32-true")
CONFIG = (f"--config={ROOT}/configs/quickstart.yaml", *SMALL)
# windows that no split of the validation text comes out even with, and a bound that every gradient meets
RUN = (
    "--model.config.drop_rate=0", "--evaluation.eval_freq=1", "--evaluation.eval_iter=null",
    "--trainer.max_epochs=-1", "--trainer.gradient_clip_val=0.1", "--data.train_ratio=0.5", "--data.stride=103",
    "--model.decay_matrices_only=true", "--model.warmup_steps=0",
)  # fmt: skip


def fit(folder: Path, run: str, *arguments: str) -> None:
    """The command in ``folder``, with 4 windows a micro-batch over all its processes."""
    batch = 2 if "--trainer.devices=2" in arguments else 4
    done = python("-m", "gpt_lightning", "fit", *CONFIG, *RUN, f"--data.batch_size={batch}",
                  f"--run={run}", *arguments, cwd=folder, env=ENVIRONMENT, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    # one process tells, whichever way they are started
    assert done.stderr.count(" parameters on ") == done.stderr.count(": done;") == 1
    steps = [line.split(")")[0] for line in done.stdout.splitlines() if line.startswith("Ep ")]
    assert len(steps) == len(set(steps))


def rows(folder: Path, run: str) -> list[dict[str, float]]:
    with (folder / "checkpoints" / run / "metrics.csv").open() as file:
        return [
            {key: float(value) for key, value in row.items() if key != "tokens_per_second"}
            for row in csv.DictReader(file)
        ]


def last(folder: Path, run: str) -> Path:
    return folder / "checkpoints" / run / "last.ckpt"


def assert_same_run(folder: Path, run: str, other: str, tolerance: float = 1e-5) -> None:
    """Losses, learning rates and gradient norms of each update, and what both left."""
    ours, theirs = rows(folder, run), rows(folder, other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        a.pop("val_perplexity"), b.pop("val_perplexity")
        assert a == pytest.approx(b, abs=tolerance)
    assert_same_content(last(folder, run), last(folder, other))


def assert_same_content(path: Path, other: Path) -> None:
    """The same keys, types and shapes throughout, and weights and moments to rounding."""
    a, b = read_checkpoint(path), read_checkpoint(other)
    assert list(a) == list(b)
    assert list(a["state_dict"]) == list(b["state_dict"])
    for name, weight in a["state_dict"].items():
        assert type(weight) is torch.Tensor
        torch.testing.assert_close(weight, b["state_dict"][name], atol=2e-4, rtol=0)
    (a,), (b,) = a["optimizer_states"], b["optimizer_states"]
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for number, moments in a["state"].items():
        assert moments.keys() == b["state"][number].keys()
        for key, value in moments.items():
            torch.testing.assert_close(value, b["state"][number][key], atol=1e-5, rtol=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the run ``one``: 20 updates of two micro-batches in one process."""
    place = tmp_path_factory.mktemp("strategies")
    fit(place, "one", "--trainer.max_steps=20", "--trainer.accumulate_grad_batches=2")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_two_processes_train_as_one(folder: Path, name: str) -> None:
    overlay = {"ddp": DDP, "fsdp": FSDP}[name]
    fit(folder, name, *overlay, "--trainer.max_steps=20", "--trainer.accumulate_grad_batches=2")
    assert_same_run(folder, name, "one")
    assert all(row["grad_norm"] > 0.1 for row in rows(folder, name))


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_another_strategy(folder: Path) -> None:
    accumulate = "--trainer.accumulate_grad_batches=2"
    fit(folder, "moved", "--trainer.max_steps=5", accumulate)
    for steps, strategy in [(10, FSDP), (15, DDP), (17, FSDP), (20, ())]:
        fit(
            folder,
            "moved",
            *strategy,
            f"--trainer.max_steps={steps}",
            accumulate,
            "--ckpt_path=last",
        )
    assert_same_run(folder, "moved", "one")


def validated(folder: Path, *arguments: str) -> dict[str, float]:
    done = python("-m", "gpt_lightning", "validate", *CONFIG, "--data.stride=37", "--json", *arguments,
                  cwd=folder, env=ENVIRONMENT, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


@pytest.mark.slow
def test_validation_counts_every_window_once(folder: Path) -> None:
    """Whatever is left for the last batch, down to nothing for the second process."""
    alone = validated(folder, "--init_from=checkpoints/one", "--data.batch_size=4")
    for arguments in ([*FSDP, "--data.batch_size=5"], [*DDP, "--data.batch_size=70"]):
        figures = validated(folder, "--init_from=checkpoints/one", *arguments)
        for split in ("train", "val"):
            assert figures[f"{split}_tokens"] == alone[f"{split}_tokens"]
            assert figures[f"{split}_loss"] == pytest.approx(alone[f"{split}_loss"], rel=1e-6)


@pytest.mark.parametrize(("batch_size", "ranks"), [(2, 2), (5, 2), (3, 4), (7, 3)])
def test_ranks_read_as_many_batches_and_each_window_once(batch_size: int, ranks: int) -> None:
    """A rank with a batch less would let the others wait for its share of the weights."""
    view = WindowDataset([np.arange(60, dtype=np.uint16)], 4, 3)
    seen = []
    counts = set()
    for rank in range(ranks):
        loader = ResumableDataLoader(view, batch_size, shuffle=False, drop_last=False, rank=rank,
                              world_size=ranks)  # fmt: skip
        batches = list(loader)
        counts.add(len(batches))
        assert len(batches) == len(loader)
        assert all(inputs.shape[1] == 4 for inputs, _ in batches)
        seen += [int(row[0]) for inputs, _ in batches for row in inputs]
    assert len(counts) == 1
    assert sorted(seen) == view.read(np.arange(len(view)))[:, 0].tolist()


@pytest.mark.slow
def test_what_fsdp2_leaves_is_read_by_everything(folder: Path) -> None:
    fit(folder, "sharded", *FSDP, "--trainer.max_steps=3")

    def command(*arguments: str) -> str:
        done = python("-m", "gpt_lightning", *arguments, cwd=folder, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("convert", "checkpoints/sharded", "exported", "--format", "hf")
    prompt = ("--prompt", "The tower clock", "--max_new_tokens=5", "--json")
    ours = json.loads(command("generate", "--from=checkpoints/sharded", *prompt))
    theirs = json.loads(command("generate", "--from=exported", *prompt))
    assert str(ours["samples"] if "samples" in ours else ours["text"]) == str(
        theirs["samples"] if "samples" in theirs else theirs["text"]
    )
    # a new run from its weights and moments, sharded and not
    begin = ("--init_from=checkpoints/sharded", "--init_optimizer=true", "--trainer.max_steps=4")
    fit(folder, "alone", *begin)
    fit(folder, "shards", *FSDP, *begin)
    assert_same_run(folder, "shards", "alone")


@pytest.mark.slow
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_settings_of_the_model_compose_with_shards(folder: Path, clip: str) -> None:
    """Tied embeddings, loss by chunks, both ways of clipping; fsdp.yaml itself checkpoints activations."""
    settings = ("--model.config.tied_embeddings=true", "--model.loss_chunk_size=7",
                f"--trainer.gradient_clip_algorithm={clip}", "--trainer.max_steps=4",
                "--trainer.gradient_clip_val=0.01")  # fmt: skip
    fit(folder, f"alone-{clip}", *settings)
    fit(folder, f"shards-{clip}", *FSDP, *settings)
    assert_same_run(folder, f"shards-{clip}", f"alone-{clip}")


class Precisions(Callback):
    """Writes down what a block computes with, what lies on the device and what the optimizer gets."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        block = module.model.trf_blocks[0]
        self.seen: dict[str, Any] = {"lies": str(block.ff.layers[0].weight.dtype)}
        self.seen["share"] = block.ff.layers[0].weight.to_local().shape[0]
        block.ff.register_forward_pre_hook(self._note)

    def _note(self, feed_forward: Any, args: Any) -> None:
        self.seen["computes"] = str(feed_forward.layers[0].weight.dtype)
        self.seen["gathered"] = feed_forward.layers[0].weight.shape[0]

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen["gradient"] = str(module.model.trf_blocks[0].ff.layers[0].weight.grad.dtype)
        path = Path(f"precisions-{trainer.global_rank}.json")
        path.write_text(json.dumps(self.seen), encoding="utf-8")


@pytest.mark.slow
def test_bf16_is_what_is_gathered_and_float32_what_is_kept(folder: Path) -> None:
    bf16 = ("--trainer.precision=bf16-mixed", "--trainer.max_steps=5")
    fit(folder, "bf16", *bf16)
    fit(folder, "bf16-shards", *FSDP, *bf16, "--allow_import=test_strategies",
        "--trainer.callbacks+=test_strategies.Precisions")  # fmt: skip
    for rank in (0, 1):
        assert json.loads((folder / f"precisions-{rank}.json").read_text()) == {
            "lies": "torch.float32", "share": 32, "computes": "torch.bfloat16", "gathered": 64,
            "gradient": "torch.float32"}  # fmt: skip
    for a, b in zip(rows(folder, "bf16"), rows(folder, "bf16-shards"), strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=2e-3)


def test_norm_is_the_whole_ones_whatever_it_is_split_into() -> None:
    """Of gradients as large as the 124M's embedding's, and as uneven."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(30_000, 300, generator=generator) * 1e-4
    large[torch.rand(30_000, generator=generator) < 0.9] *= 0.01
    small = torch.randn(300, generator=generator) * 1e-3
    exact = math.sqrt(float(large.double().square().sum() + small.double().square().sum()))
    assert float(global_grad_norm([large, small])) == pytest.approx(exact, rel=1e-6)
    shares = [
        float(global_grad_norm([a, b])) for a, b in zip(large.chunk(2), small.chunk(2), strict=True)
    ]
    assert math.hypot(*shares) == pytest.approx(exact, rel=1e-6)
    assert float(global_grad_norm([])) == 0.0


class NotFinite(Callback):
    """Spoils one rank's share of a gradient in the third update."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            gradient = next(module.model.trf_blocks.parameters()).grad
            getattr(gradient, "_local_tensor", gradient).fill_(torch.nan)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "stop"])
def test_a_bad_share_is_every_ranks_bad_step(tmp_path: Path, action: str) -> None:
    done = python("-m", "gpt_lightning", "fit", *CONFIG, *FSDP, "--allow_import=test_strategies",
                  "--trainer.callbacks+=test_strategies.NotFinite", f"--bad_steps={action}",
                  "--trainer.max_steps=4", "--evaluation.eval_freq=1", "--checkpoint.every_n_train_steps=1",
                  cwd=tmp_path, env=ENVIRONMENT, timeout=100)  # fmt: skip
    assert "step 2: loss " in done.stderr
    assert "gradient norm nan" in done.stderr
    if action == "skip":
        assert done.returncode == 0, done.stderr
        a, b = (read_checkpoint(last(tmp_path, "quickstart").with_name(f"{name}.ckpt"))
                for name in ("previous", "last"))  # fmt: skip
        assert (a["global_step"], b["global_step"]) == (3, 4)
    else:
        assert done.returncode == 1, done.stderr
        assert read_checkpoint(last(tmp_path, "quickstart"))["global_step"] == 2


@pytest.mark.slow
def test_a_signal_to_either_process_stops_both_with_a_checkpoint(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt_lightning", "fit", *CONFIG, *FSDP, "--trainer.max_epochs=-1",
         "--trainer.max_steps=100000", "--evaluation.eval_freq=5", "--checkpoint.every_n_train_steps=20",
         "--evaluation.prompt=null"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 100
        while not last(tmp_path, "quickstart").exists():
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        (other,) = psutil.Process(process.pid).children()
        other.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, said
    assert "Traceback" not in said
    step = int(said.split("stopping after ")[1].split()[0])
    assert read_checkpoint(last(tmp_path, "quickstart"))["global_step"] == step


@pytest.mark.slow
def test_resume_is_exact_on_shards(tmp_path: Path) -> None:
    done = python("-m", "gpt_lightning", "verify-resume", *CONFIG, *FSDP, "--steps=3", "--more_steps=3",
                  "--model.config.drop_rate=0.1", "--json", cwd=tmp_path, env=ENVIRONMENT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["exact"] is True


SCALING = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")


def block_after(heading: str) -> str:
    """The first block of commands under a heading of docs/distributed.md."""
    return SCALING.split(f"## {heading}\n")[1].split("```")[1].split("\n", 1)[1]


@pytest.mark.slow
def test_two_nodes_under_torchrun(folder: Path) -> None:
    """The command of docs/distributed.md, once for each node; the settings of the run ``one`` are added to it."""
    (line,) = [x for x in block_after("Several machines: torchrun").replace("\\\n", " ").splitlines()
               if x.startswith("torchrun")]  # fmt: skip
    config = "--config configs/quickstart.yaml --config configs/fsdp.yaml"
    assert config in line
    own = " ".join((*CONFIG, *RUN, FSDP[0], FSDP[2], "--data.batch_size=2", "--trainer.max_steps=20",
                    "--trainer.accumulate_grad_batches=2"))  # fmt: skip
    line = (
        line.replace(config, own)
        .replace("--run big", "--run nodes")
        .replace("node0:29500", "127.0.0.1:29713")
    )
    line = line.replace("--nproc_per_node 8", "--nproc_per_node 1").replace(
        "--trainer.devices 8", "--trainer.devices 1"
    )
    line = line.replace("torchrun", f"{sys.executable} -m torch.distributed.run")
    nodes = [subprocess.Popen(line.split(), cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) for _ in range(2)]  # fmt: skip
    try:
        said = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum(text.count(": done;") for text in said) == 1
    assert_same_run(folder, "nodes", "one")


SRUN = """#!/bin/sh
# what srun does for two nodes with a task each
for task in 0 1; do
  SLURM_PROCID=$task SLURM_NODEID=$task SLURM_LOCALID=0 "$@" & pids="$pids $!"
done
echo "$pids" > srun.pids
code=0
for pid in $pids; do wait $pid || code=$?; done
exit $code
"""


@pytest.mark.slow
def test_the_slurm_script_with_a_stand_in_for_srun(tmp_path: Path) -> None:
    """SLURM's warning to both tasks: the run is saved, the job requeued, and the same script goes on with it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, content in [("srun", SRUN), ("scontrol", '#!/bin/sh\necho "$@" >> asked\n')]:
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)
    script = block_after("Several machines: SLURM")
    own = " ".join((*CONFIG, "--trainer.max_epochs=-1", "--trainer.max_steps=100000",
                    "--evaluation.prompt=null", FSDP[0], FSDP[2], "--checkpoint.every_n_train_steps=20"))  # fmt: skip
    script = script.replace("--config configs/quickstart.yaml --config configs/fsdp.yaml", own)
    script = script.replace("--trainer.devices 8", "--trainer.devices 1")
    (tmp_path / "job.sh").write_text(script)
    environment = {
        **ENVIRONMENT, "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "big", "SLURM_NTASKS": "2", "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NUM_NODES": "2",
    }  # fmt: skip
    steps = []
    for _ in range(2):
        job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        try:
            end = time.monotonic() + 100
            wanted = 20 + (steps[-1] if steps else 0)
            checkpoint = last(tmp_path, "big")
            while not (
                checkpoint.exists() and read_checkpoint(checkpoint)["global_step"] >= wanted
            ):
                assert time.monotonic() < end
                assert job.poll() is None, job.communicate()
                time.sleep(0.2)
            for pid in (tmp_path / "srun.pids").read_text().split():
                os.kill(int(pid), signal.SIGUSR1)
            _, said = job.communicate(timeout=60)
        finally:
            job.kill()
        assert "stopping after" in said, said
        steps.append(read_checkpoint(checkpoint)["global_step"])
        assert f"stopping after {steps[-1]} steps" in said
    assert steps[1] >= steps[0] + 20
    assert (tmp_path / "asked").read_text().split() == ["requeue", "4711"] * 2


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--trainer.strategy=ddp_spawn", "--trainer.devices=2"], "trainer.strategy: ddp_spawn is unknown; did you mean ddp?"),
        (["--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy"],
         "trainer.strategy: ModelParallelStrategy does not write checkpoints"),
        (["--trainer.strategy=fsdp"], "trainer.strategy: fsdp is unknown; to shard the model, give --config configs/fsdp.yaml"),
        (["--trainer.strategy=nonsense"], "trainer.strategy: nonsense is unknown; give one of auto, ddp"),
        ([*FSDP, "--trainer.precision=16-mixed"], "Choose a different precision among"),
        ([*FSDP, "--trainer.strategy.process_group_backend=tcp"], "process_group_backend"),
        (["--trainer.devices=-3"], "trainer.devices: -3 is not a number of devices"),
        (["--trainer.num_nodes=0"], "trainer.num_nodes: 0 is too small"),
        ([*FSDP, "--data.batch_size=100"], "data.batch_size: 100 on 2 device(s) is more than the"),
    ],
)  # fmt: skip
def test_bad_settings(command: Command, arguments: list[str], cause: str) -> None:
    done = command("fit", *CONFIG, *arguments)
    assert (done.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("gpt_lightning: error: ")
    assert cause in done.err
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize("line", re.findall(r"^python -m gpt_lightning (.+)$", SCALING, re.M))
def test_commands_of_the_docs_parse(
    command: Command, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        command(*shlex.split(line), "--print_config")
    assert stop.value.code == 0


def test_overlays_go_on_top_of_any_config(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for base in ("quickstart", "verdict", "gpt2"):
        for name in ("ddp", "fsdp"):
            with pytest.raises(SystemExit) as stop:
                command("fit", f"--config={ROOT}/configs/{base}.yaml", f"--config={ROOT}/configs/{name}.yaml",
                        "--print_config")  # fmt: skip
            assert stop.value.code == 0
            printed = capsys.readouterr().out
            assert f"run: {base}" in printed
            assert {"ddp": "DDPStrategy", "fsdp": "FSDP2Strategy"}[name] in printed
