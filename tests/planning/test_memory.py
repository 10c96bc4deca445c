"""The memory of a step by formula, against autograd, the profiler and recorded GPU runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.model.loss import chunked_cross_entropy, cross_entropy
from gpt_lightning.model.precision import PRECISIONS
from gpt_lightning.planning.memory import step_memory
from gpt_lightning.planning.plan import RunSpec, memory
from gpt_lightning.planning.step_parts import StepShape
from gpt_lightning.training.optimizer import OptimizerConfig

SMALL_CONFIG = GPTConfig(
    vocab_size=5000, context_length=16, emb_dim=32, n_heads=2, n_layers=3, drop_rate=0.0
)


@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_predicted_activations_equal_what_autograd_keeps(drop_rate: float, precision: str) -> None:
    """Each storage of a real forward pass that is kept for the backward pass, without the weights."""
    config = replace(SMALL_CONFIG, drop_rate=drop_rate)
    counted = step_memory(StepShape(config, 2, 16, precision=precision))
    assert counted.phase == "loss"  # when all is kept
    model = GPTModel(config)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    idx = torch.zeros(2, 16, dtype=torch.int64)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
    ):
        features = model.features(idx)
    keep(features.detach())
    for tensor in (*model.parameters(), idx):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    cast = 0
    if precision == "bf16-mixed":  # kept by autocast to the end of its pass, but not by autograd
        cast = config.vocab_size * config.emb_dim + sum(
            p.numel() for n, p in model.named_parameters() if n.endswith("bias") and "norm" not in n
        )
    indices = 16 * 8  # into the positions' embedding, which are not counted
    assert counted.activations + counted.copies - 2 * cast == pytest.approx(
        sum(kept.values()), abs=indices
    )


def optimizer_config(shape: StepShape) -> OptimizerConfig:
    return OptimizerConfig(optimizer="muon" if shape.muon else "adamw")


def allocated_at_peak(shape: StepShape, folder: Path) -> int:
    """Highest number of bytes of tensors in two optimizer steps on the CPU, as torch's profiler records them."""
    dtype, low = PRECISIONS[shape.precision]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model = GPTModel(shape.config).to(dtype)
        model.activation_checkpointing = shape.activation_checkpointing
        optimizer = optimizer_config(shape).build(model, precision=shape.precision)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn()) if shape.ema else None
        idx, targets = torch.zeros(2, shape.batch_size, shape.length, dtype=torch.int64)
        for _ in range(2):
            for micro_batch in range(1 + shape.accumulate):
                with torch.autocast("cpu", low, enabled=low is not None):
                    features = model.features(idx)
                    if shape.loss_chunk_size is None:
                        loss = cross_entropy(model.head(features), targets)
                    else:
                        loss = chunked_cross_entropy(
                            features, model.head_weight, targets, shape.loss_chunk_size
                        )
                del features
                if micro_batch == 0:
                    optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
    record.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in events]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, {}),
        ({"accumulate": True}, {}),
        ({"ema": True}, {}),
        ({"loss_chunk_size": 64}, {}),
        ({"loss_chunk_size": 32, "activation_checkpointing": True, "batch_size": 16}, {}),
        ({"activation_checkpointing": True}, {"vocab_size": 500}),
        ({"precision": "bf16-mixed"}, {}),
        ({"loss_chunk_size": 64, "batch_size": 8}, {"vocab_size": 100, "n_layers": 6}),
        ({}, {"vocab_size": 500, "drop_rate": 0.1}),
        ({"batch_size": 1}, {"vocab_size": 500, "tied_embeddings": True, "qkv_bias": True}),
        ({"muon": True}, {}),
        ({"muon": True, "length": 4, "batch_size": 1}, {"vocab_size": 50, "n_layers": 1}),
        ({"muon": True, "precision": "bf16-mixed"}, {}),
    ],
    ids=str,
)
def test_tensors_of_a_step_take_the_predicted_memory(
    changes: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    """Within 1 % of what a real step allocates on a CPU."""
    architecture = replace(SMALL_CONFIG, context_length=64, emb_dim=64, n_heads=4, **config)
    shape = replace(StepShape(architecture, 4, 64), **changes)
    shape = replace(shape, state_values=optimizer_config(shape).state_values(architecture))
    assert step_memory(shape).total == pytest.approx(allocated_at_peak(shape, tmp_path), rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("length", "n_heads"), [(512, 8), (600, 2), (1024, 8)])
def test_attention_by_blocks_takes_the_predicted_memory(
    length: int, n_heads: int, checkpointing: bool, tmp_path: Path
) -> None:
    """In bfloat16 on a CPU: kept in short windows, computed again in long ones. Within 7 %."""
    architecture = replace(
        SMALL_CONFIG, context_length=length, emb_dim=64, n_heads=n_heads, vocab_size=100
    )
    shape = StepShape(architecture, 2, length, precision="bf16-mixed", activation_checkpointing=checkpointing)  # fmt: skip
    shape = replace(shape, state_values=optimizer_config(shape).state_values(architecture))
    assert step_memory(shape).total == pytest.approx(allocated_at_peak(shape, tmp_path), rel=0.07)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shards", [1, 4])
def test_memory_of_a_step_is_linear_in_windows(accumulate: bool, shards: int) -> None:
    first, second, third = (
        step_memory(
            StepShape(SMALL_CONFIG, b, 16, accumulate=accumulate, shards=shards, device="cuda")
        ).total
        for b in (16, 32, 48)
    )
    assert second - first == pytest.approx(third - second, rel=1e-3)


def test_dropout_keeps_the_attention_matrix_on_a_cpu_but_not_on_a_gpu() -> None:
    """Three matrices of T × T per head in float32: weights, dropout and their product."""
    config = replace(SMALL_CONFIG, context_length=256, n_layers=2)
    kept = {}
    for rate in (0.0, 0.1):
        for device in ("cpu", "cuda"):
            step = StepShape(replace(config, drop_rate=rate), 1, 256, device=device)  # type: ignore[arg-type]
            kept[rate, device] = step_memory(step).activations
    matrices = 4 * config.n_layers * config.n_heads * 256 * 256
    assert kept[0.1, "cpu"] - kept[0.0, "cpu"] >= 3 * matrices
    assert kept[0.1, "cuda"] - kept[0.0, "cuda"] < matrices / 10


def operations_of_the_loss(device: str) -> list[tuple[str, list[torch.dtype]]]:
    """Operations and result types of the loss of bfloat16 logits under that device's autocast."""
    operations = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.namespace == "aten":
                results = [t.dtype for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
                operations.append((str(func), results))
            return out

    with FakeTensorMode():
        logits = torch.empty(4, 7, dtype=torch.bfloat16, device=device)
        targets = torch.zeros(4, dtype=torch.int64, device=device)
        before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        torch.set_autocast_enabled(device, True)  # torch.autocast asks whether there is a GPU
        torch.set_autocast_dtype(device, torch.bfloat16)
        try:
            with Recorder():
                F.cross_entropy(logits, targets)
        finally:
            torch.set_autocast_enabled(device, before[0])
            torch.set_autocast_dtype(device, before[1])
    return operations


def test_autocast_casts_the_log_softmax_on_a_gpu_and_the_logits_on_a_cpu() -> None:
    """This gives 2 + 4 + 4 bytes per logit on a GPU and 4 + 4 + 4 on a CPU."""
    low, full = [torch.bfloat16], [torch.float32]
    assert operations_of_the_loss("cuda") == [
        ("aten._log_softmax.default", low),
        ("aten._to_copy.default", full),
        ("aten.nll_loss_forward.default", full + full),
    ]
    assert operations_of_the_loss("cpu")[:2] == [
        ("aten._to_copy.default", full),
        ("aten._log_softmax.default", full),
    ]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_loss_in_autocast_on_a_gpu_takes_ten_bytes_per_logit(precision: str) -> None:
    """The logarithm of softmax in 2 bytes, its copy in float32 and the gradient of the copy."""
    config = replace(SMALL_CONFIG, vocab_size=20000)
    counted = step_memory(StepShape(config, 32, 16, precision=precision, device="cuda"))
    assert counted.phase == "loss"
    assert counted.loss == pytest.approx(10 * 32 * 16 * config.vocab_size, rel=0.001)
    whole = step_memory(
        StepShape(config, 32, 16, device="cuda")
    )  # softmax, its and logits' gradient
    assert whole.loss == pytest.approx(12 * 32 * 16 * config.vocab_size, rel=0.001)


def test_chunked_loss_and_checkpointing_keep_what_is_predicted() -> None:
    config = replace(SMALL_CONFIG, vocab_size=20000, n_layers=6)
    C, N = config.emb_dim, 32 * 16
    plain = StepShape(config, 32, 16, device="cuda")
    counted = step_memory(plain)
    assert counted.loss >= 4 * 2 * N * config.vocab_size  # logits and their softmax
    chunked = step_memory(replace(plain, loss_chunk_size=64))
    assert chunked.loss < 4 * (4 * 64 * config.vocab_size + 3 * C * (config.vocab_size + N))
    again = step_memory(replace(plain, activation_checkpointing=True))
    # each block's input, the last norm's input, output and statistics
    assert again.activations == pytest.approx(4 * N * ((6 + 2) * C + 2), abs=N)
    assert step_memory(replace(plain, precision="bf16-true")).total * 2 == pytest.approx(
        counted.total, rel=0.01
    )


def test_optimizer_step_in_float16_is_not_fused() -> None:
    """It takes one more value per weight, which is visible in the smallest step."""
    step = StepShape(replace(SMALL_CONFIG, n_layers=1), 1, 1, precision="16-mixed", device="cuda")
    lines, when = memory(RunSpec(step))
    assert when == "optimizer step"
    assert lines["optimizer step"] == lines["weights"]
