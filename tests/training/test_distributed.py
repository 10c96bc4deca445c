"""DDP and FSDP2 on two CPU processes: the losses of one process, checkpoints for any number of them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback

from gpt_lightning.pretrained.weights import read_checkpoint
from helpers import (
    ENVIRONMENT,
    FSDP,
    ROOT,
    SCALING,
    SMALL_QUICKSTART,
    python,
)

DDP_CONFIG = (f"--config={ROOT}/configs/ddp.yaml", "--trainer.devices=2")


# the number of validation windows never divides evenly, and each gradient is clipped
RUN_SETTINGS = (
    "--model.config.emb_dim=16",
    "--model.config.drop_rate=0", "--evaluation.eval_freq=1", "--evaluation.eval_iter=null",
    "--trainer.max_epochs=-1", "--trainer.gradient_clip_val=0.1", "--data.train_ratio=0.5", "--data.stride=103",
    "--model.decay_matrices_only=true", "--model.warmup_steps=0", "--model.ema_decay=0.8",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the run ``one``: 20 steps of two micro-batches in one process."""
    place = tmp_path_factory.mktemp("strategies")
    run_fit(place, "one", "--trainer.max_steps=20", "--trainer.accumulate_grad_batches=2")
    return place


def run_fit(folder: Path, run: str, *arguments: str, batch: int | None = None) -> None:
    """Run ``fit`` in ``folder``, with 4 windows per micro-batch over all processes, or ``batch`` on each."""
    batch = batch or (2 if "--trainer.devices=2" in arguments else 4)
    result = python("-m", "gpt_lightning", "fit", *SMALL_QUICKSTART, *RUN_SETTINGS, f"--data.batch_size={batch}",
                  f"--run={run}", *arguments, cwd=folder, env=ENVIRONMENT, timeout=120)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Warning" not in result.stderr
    # only rank 0 prints
    assert result.stderr.count(" parameters on ") == result.stderr.count(": done;") == 1
    steps = [line.split(")")[0] for line in result.stdout.splitlines() if line.startswith("Ep ")]
    assert len(steps) == len(set(steps))


def rows(folder: Path, run: str) -> list[dict[str, float]]:
    with (folder / "checkpoints" / run / "metrics.csv").open() as file:
        return [
            {
                key: float(value)
                for key, value in row.items()
                if value and key != "tokens_per_second"
            }
            for row in csv.DictReader(file)
        ]


def val_losses(folder: Path, run: str) -> list[float]:
    return [row["val_loss"] for row in rows(folder, run) if "val_loss" in row]


def last_path(folder: Path, run: str) -> Path:
    return folder / "checkpoints" / run / "last.ckpt"


def assert_same_content(path: Path, other: Path) -> None:
    """Both have the same keys, types and shapes, and equal weights and moments up to rounding."""
    a, b = read_checkpoint(path), read_checkpoint(other)
    assert list(a) == list(b)
    assert a["ema_updates"] == b["ema_updates"]
    for key in ("state_dict", "state_dict_ema"):
        assert list(a[key]) == list(b[key]) == list(a["state_dict"])
        for name, weight in a[key].items():
            assert type(weight) is torch.Tensor
            torch.testing.assert_close(weight, b[key][name], atol=2e-4, rtol=0)
    (a,), (b,) = a["optimizer_states"], b["optimizer_states"]
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for number, moments in a["state"].items():
        assert moments.keys() == b["state"][number].keys()
        for key, value in moments.items():
            torch.testing.assert_close(value, b["state"][number][key], atol=1e-5, rtol=1e-3)


def assert_same_run(folder: Path, run: str, other: str, tolerance: float = 1e-5) -> None:
    """Losses, learning rates and gradient norms of each step, and the last checkpoints, are equal."""
    ours, theirs = rows(folder, run), rows(folder, other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        a.pop("val_perplexity", None), b.pop("val_perplexity", None)
        assert a == pytest.approx(b, abs=tolerance)
    assert_same_content(last_path(folder, run), last_path(folder, other))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_two_processes_train_as_one(folder: Path, name: str) -> None:
    overlay = {"ddp": DDP_CONFIG, "fsdp": FSDP}[name]
    run_fit(folder, name, *overlay, "--trainer.max_steps=20", "--trainer.accumulate_grad_batches=2")
    assert_same_run(folder, name, "one")
    norms = [row["train/grad_norm"] for row in rows(folder, name) if "train/grad_norm" in row]
    assert len(norms) == 2
    assert min(norms) > 0.1


@pytest.mark.slow
def test_muon_trains_as_in_one_process(folder: Path) -> None:
    """With DDP, with FSDP2 whose matrices are gathered, and moved between them; products in float32."""
    settings = ("--model.optimizer=muon", "--trainer.accumulate_grad_batches=2")
    run_fit(folder, "muon", *settings, "--trainer.max_steps=20")
    for name, overlay in (("ddp", DDP_CONFIG), ("fsdp", FSDP)):
        run_fit(folder, f"muon-{name}", *settings, *overlay, "--trainer.max_steps=20")
        assert_same_run(folder, f"muon-{name}", "muon")
    for steps, overlay in [(7, FSDP), (14, DDP_CONFIG), (20, ())]:
        resumes = ("--ckpt_path=last",) if steps > 7 else ()
        run_fit(folder, "muon-moved", *settings, *overlay, f"--trainer.max_steps={steps}", *resumes)
    assert_same_run(folder, "muon-moved", "muon")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_muon_in_bfloat16_is_as_near_as_the_order_of_sums(folder: Path, name: str) -> None:
    """The losses differ from those of one process by no more than those of three orders of summation do.

    FSDP2 gathers the weights in bfloat16, which is other arithmetic than autocast's, so its one process has it, too.
    """
    alone, both = {"ddp": ((), DDP_CONFIG), "fsdp": ((*FSDP, "--trainer.devices=1"), FSDP)}[name]
    settings = ("--trainer.precision=bf16-mixed", "--model.optimizer=muon", "--trainer.max_steps=20",
                "--data.global_batch_size=4")  # fmt: skip
    for batch in (4, 2, 1):
        run_fit(folder, f"{name}-order-{batch}", *alone, *settings, batch=batch)
    orders = [val_losses(folder, f"{name}-order-{batch}") for batch in (4, 2, 1)]
    run_fit(folder, f"bf16-{name}", *both, *settings, batch=2)
    spread = max(
        abs(a - b) for one in orders for other in orders for a, b in zip(one, other, strict=True)
    )
    assert 0 < spread < 0.02
    assert val_losses(folder, f"bf16-{name}") == pytest.approx(orders[0], abs=spread)


@pytest.mark.slow
def test_run_resumes_with_other_devices_and_another_strategy(folder: Path) -> None:
    accumulate = "--trainer.accumulate_grad_batches=2"
    run_fit(folder, "moved", "--trainer.max_steps=5", accumulate)
    for steps, strategy in [(10, FSDP), (15, DDP_CONFIG), (17, FSDP), (20, ())]:
        run_fit(
            folder,
            "moved",
            *strategy,
            f"--trainer.max_steps={steps}",
            accumulate,
            "--ckpt_path=last",
        )
    assert_same_run(folder, "moved", "one")


@pytest.mark.slow
def test_checkpoint_of_fsdp2_is_read_by_all_commands(folder: Path) -> None:
    run_fit(folder, "sharded", *FSDP, "--trainer.max_steps=3")

    def command(*arguments: str) -> str:
        result = python("-m", "gpt_lightning", *arguments, cwd=folder, env=ENVIRONMENT)
        assert result.returncode == 0, result.stderr
        return result.stdout

    command("convert", "checkpoints/sharded", "exported", "--format", "hf")
    prompt = ("--prompt", "The tower clock", "--max_new_tokens=5", "--json")
    ours = json.loads(command("generate", "--from=checkpoints/sharded", *prompt))
    theirs = json.loads(command("generate", "--from=exported", *prompt))
    assert str(ours["samples"] if "samples" in ours else ours["text"]) == str(
        theirs["samples"] if "samples" in theirs else theirs["text"]
    )
    # a new run from its weights and moments, sharded and not
    begin = ("--init_from=checkpoints/sharded", "--init_optimizer=true", "--trainer.max_steps=4")
    run_fit(folder, "alone", *begin)
    run_fit(folder, "shards", *FSDP, *begin)
    assert_same_run(folder, "shards", "alone")


@pytest.mark.slow
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_settings_of_the_model_compose_with_shards(folder: Path, clip: str) -> None:
    """Tied embeddings, chunked loss, both kinds of clipping; fsdp.yaml checkpoints activations."""
    settings = ("--model.config.tied_embeddings=true", "--model.loss_chunk_size=7",
                f"--trainer.gradient_clip_algorithm={clip}", "--trainer.max_steps=4",
                "--trainer.gradient_clip_val=0.01")  # fmt: skip
    run_fit(folder, f"alone-{clip}", *settings)
    run_fit(folder, f"shards-{clip}", *FSDP, *settings)
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
def test_fsdp2_gathers_bf16_and_keeps_float32(folder: Path) -> None:
    bf16 = ("--trainer.precision=bf16-mixed", "--trainer.max_steps=5")
    run_fit(folder, "bf16", *bf16)
    run_fit(folder, "bf16-shards", *FSDP, *bf16, f"--allow_import={__name__}",
        f"--trainer.callbacks+={__name__}.Precisions")  # fmt: skip
    for rank in (0, 1):
        assert json.loads((folder / f"precisions-{rank}.json").read_text()) == {
            "lies": "torch.float32", "share": 32, "computes": "torch.bfloat16", "gathered": 64,
            "gradient": "torch.float32"}  # fmt: skip
    for a, b in zip(rows(folder, "bf16"), rows(folder, "bf16-shards"), strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=2e-3)


class NotFinite(Callback):
    """Spoils one rank's share of a gradient in the third step."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            gradient = next(module.model.trf_blocks.parameters()).grad
            getattr(gradient, "_local_tensor", gradient).fill_(torch.nan)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "stop"])
def test_bad_gradient_of_one_rank_is_a_bad_step_of_all(tmp_path: Path, action: str) -> None:
    result = python("-m", "gpt_lightning", "fit", *SMALL_QUICKSTART, *FSDP, f"--allow_import={__name__}",
                  f"--trainer.callbacks+={__name__}.NotFinite", f"--bad_steps={action}",
                  "--trainer.max_steps=4", "--evaluation.eval_freq=1", "--checkpoint.every_n_train_steps=1",
                  cwd=tmp_path, env=ENVIRONMENT, timeout=100)  # fmt: skip
    assert "step 2: loss " in result.stderr
    assert "gradient norm nan" in result.stderr
    if action == "skip":
        assert result.returncode == 0, result.stderr
        a, b = (read_checkpoint(last_path(tmp_path, "quickstart").with_name(f"{name}.ckpt"))
                for name in ("previous", "last"))  # fmt: skip
        assert (a["global_step"], b["global_step"]) == (3, 4)
    else:
        assert result.returncode == 1, result.stderr
        assert read_checkpoint(last_path(tmp_path, "quickstart"))["global_step"] == 2


@pytest.mark.slow
def test_signal_to_one_process_stops_both_with_a_checkpoint(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt_lightning", "fit", *SMALL_QUICKSTART, *FSDP, "--trainer.max_epochs=-1",
         "--trainer.max_steps=100000", "--evaluation.eval_freq=5", "--checkpoint.every_n_train_steps=20",
         "--evaluation.prompt=null"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 100
        while not last_path(tmp_path, "quickstart").exists():
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        (other,) = psutil.Process(process.pid).children()
        other.send_signal(signal.SIGTERM)
        _, output = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, output
    assert "Traceback" not in output
    step = int(output.split("stopping after ")[1].split()[0])
    assert read_checkpoint(last_path(tmp_path, "quickstart"))["global_step"] == step


@pytest.mark.slow
def test_verify_resume_is_exact_with_fsdp2(tmp_path: Path) -> None:
    result = python("-m", "gpt_lightning", "verify-resume", *SMALL_QUICKSTART, *FSDP, "--steps=3", "--more_steps=3",
                  "--model.config.drop_rate=0.1", "--json", cwd=tmp_path, env=ENVIRONMENT)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["exact"] is True


def validated(folder: Path, *arguments: str) -> dict[str, float]:
    result = python("-m", "gpt_lightning", "validate", *SMALL_QUICKSTART, "--model.config.emb_dim=16",
                  "--data.stride=37", "--json", *arguments,
                  cwd=folder, env=ENVIRONMENT, timeout=120)  # fmt: skip
    assert result.returncode == 0, result.stderr
    metrics: dict[str, float] = json.loads(result.stdout)
    return metrics


@pytest.mark.slow
def test_validation_counts_each_window_once(folder: Path) -> None:
    """The last batch may be smaller, or empty for the second process."""
    alone = validated(folder, "--init_from=checkpoints/one", "--data.batch_size=4")
    for arguments in ([*FSDP, "--data.batch_size=5"], [*DDP_CONFIG, "--data.batch_size=70"]):
        metrics = validated(folder, "--init_from=checkpoints/one", *arguments)
        for split in ("train", "val"):
            assert metrics[f"{split}_tokens"] == alone[f"{split}_tokens"]
            assert metrics[f"{split}_loss"] == pytest.approx(alone[f"{split}_loss"], rel=1e-6)


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
    own = " ".join((*SMALL_QUICKSTART, *RUN_SETTINGS, FSDP[0], FSDP[2], "--data.batch_size=2", "--trainer.max_steps=20",
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
        output = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], output
    assert sum(text.count(": done;") for text in output) == 1
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
def test_slurm_script_with_a_substitute_for_srun(tmp_path: Path) -> None:
    """SLURM warns both tasks: the run is saved, the job requeued, and the same script resumes it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, content in [("srun", SRUN), ("scontrol", '#!/bin/sh\necho "$@" >> asked\n')]:
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)
    script = block_after("Several machines: SLURM")
    own = " ".join((*SMALL_QUICKSTART, "--trainer.max_epochs=-1", "--trainer.max_steps=100000",
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
            checkpoint = last_path(tmp_path, "big")
            while not (
                checkpoint.exists() and read_checkpoint(checkpoint)["global_step"] >= wanted
            ):
                assert time.monotonic() < end
                assert job.poll() is None, job.communicate()
                time.sleep(0.2)
            for pid in (tmp_path / "srun.pids").read_text().split():
                os.kill(int(pid), signal.SIGUSR1)
            _, output = job.communicate(timeout=60)
        finally:
            job.kill()
        assert "stopping after" in output, output
        steps.append(read_checkpoint(checkpoint)["global_step"])
        assert f"stopping after {steps[-1]} steps" in output
    assert steps[1] >= steps[0] + 20
    assert (tmp_path / "asked").read_text().split() == ["requeue", "4711"] * 2
