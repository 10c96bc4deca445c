"""Two CPU processes train and resume as one."""

import json
from pathlib import Path

import pytest

from helpers import (
    SMALL_QUICKSTART,
    Command,
    python,
)
from runs import (
    BARE,
    losses,
)

SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from gpt_lightning import GPTConfig, GPTModel

dist.init_process_group("gloo")
torch.manual_seed(1)
model = GPTModel(GPTConfig(context_length=8, emb_dim=16, n_heads=2, n_layers=2, vocab_size=64)).eval()
ids = torch.arange(16).view(2, 8)
expected = model(ids)
for block in model.trf_blocks:
    fully_shard(block)
fully_shard(model)
mine = ids if dist.get_rank() == 0 else ids[:0]
with torch.no_grad():
    found = model(mine)
torch.testing.assert_close(found, expected[: len(mine)])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_rank_without_windows_takes_part_in_fsdp2(tmp_path: Path) -> None:
    """FSDP2 gathers the weights of a block from all ranks, so a rank without a batch must take part."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    result = python(*launch, "sharded.py", cwd=tmp_path, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_run_of_two_processes_resumes_in_one_process(fit: Command, tmp_path: Path) -> None:
    """With a global batch of 4, stopped within an epoch: two processes, then one, with evaluations."""
    common = (*BARE, "--data.global_batch_size=4", "--data.batch_size=1", "--evaluation.eval_freq=1",
              "--evaluation.eval_iter=null")  # fmt: skip
    fit(*common, "--run=one", "--trainer.max_steps=7")
    result = python("-m", "gpt_lightning", "fit", *SMALL_QUICKSTART, *common, "--run=two",
                  "--trainer.max_steps=5", "--trainer.devices=2", "--trainer.strategy=ddp",
                  cwd=tmp_path, timeout=100)  # fmt: skip
    assert result.returncode == 0, result.stderr
    fit(*common, "--run=two", "--trainer.max_steps=7", "--ckpt_path=last")
    rows = [
        [row.split(",") for row in Path(f"checkpoints/{run}/metrics.csv").read_text().splitlines()]
        for run in ("one", "two")
    ]
    columns = [rows[0][0].index(name) for name in ("step", "train_loss", "val_loss", "tokens_seen")]
    metrics = [[[float(row[i]) for i in columns] for row in run[1:]] for run in rows]
    assert len(metrics[0]) == len(metrics[1]) == 7
    for ours, theirs in zip(*metrics, strict=True):
        assert theirs == pytest.approx(ours, abs=1e-5)


@pytest.mark.slow
def test_ddp_run_equals_a_run_of_one_process(fit: Command, tmp_path: Path) -> None:
    """The losses equal those of one process with the same global batch, also after a resume."""
    base = ("-m", "gpt_lightning", "fit", *SMALL_QUICKSTART)
    extra = (
        "--evaluation.eval_freq=2",
        "--evaluation.eval_iter=null",
        "--model.config.drop_rate=0",
    )
    ddp = ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=1", "--run=two")

    def two(*arguments: str) -> None:
        result = python(*base, *extra, *ddp, *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "sync_dist" not in result.stderr

    two("--trainer.max_steps=5")
    two("--trainer.max_steps=9", "--ckpt_path=last")
    fit(*extra, "--trainer.max_steps=9", "--run=one")
    for ours, theirs in zip(losses("one"), losses("two"), strict=True):
        assert [float(x) for x in theirs] == pytest.approx([float(x) for x in ours], abs=1e-5)
    validate = ("-m", "gpt_lightning", "validate", "--config=checkpoints/two/config.yaml")
    result = python(*validate, "--ckpt_path=last", "--json", cwd=tmp_path)
    alone = python(*validate, "--ckpt_path=last", "--json", "--trainer.devices=1", cwd=tmp_path)
    assert json.loads(result.stdout) == pytest.approx(json.loads(alone.stdout), abs=1e-5)
