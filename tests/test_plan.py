"""``plan``: its formulas against models, measured allocations, recorded GPU runs and runs of ``fit``."""

import importlib.util
import json
import os
import re
import sys
from dataclasses import replace
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, Command, python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.data.epochs import nearest_multiple
from gpt_lightning.model import flops as cost
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.kv_cache import KVCache
from gpt_lightning.model.loss import chunked_cross_entropy, cross_entropy
from gpt_lightning.model.precision import PRECISIONS
from gpt_lightning.planning.memory import StepShape, step_memory
from gpt_lightning.planning.plan import RunSpec, memory, plan
from gpt_lightning.pretrained.weights import read_checkpoint

QUICKSTART = f"--config={ROOT}/configs/quickstart.yaml"
PRETRAIN = ROOT / "configs" / "pretrain-124M.yaml"
DOC = ROOT / "docs" / "planning.md"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """benchmarks/plan.py, which makes the tables of the docs."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("plan_benchmark", ROOT / "benchmarks/plan.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("size", GPT2_SIZES)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_cache_are_the_models(size: str, tied: bool) -> None:
    config = replace(GPT2_SIZES[size], tied_embeddings=tied)
    with torch.device("meta"):
        model = GPTModel(config)
        cache = KVCache.allocate(config, 1, config.context_length, dtype=torch.bfloat16)
    block = sum(p.numel() for p in model.trf_blocks[0].parameters())
    embeddings = sum(p.numel() for n, p in model.named_parameters() if re.search("emb|head", n))
    assert cost.block_parameters(config) == block
    assert cost.embedding_parameters(config) == embeddings
    assert cost.parameters(config) == sum(p.numel() for p in model.parameters())
    cache_bytes = sum(part.nbytes for part in (*cache.keys, *cache.values))
    assert cost.kv_cache_bytes(config, 1, config.context_length, 2) == cache_bytes


SMALL_CONFIG = GPTConfig(
    vocab_size=5000, context_length=16, emb_dim=32, n_heads=2, n_layers=3, drop_rate=0.0
)


@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_activations_are_what_autograd_keeps(drop_rate: float, precision: str) -> None:
    """Of a real forward pass: every storage that is kept for the backward one, once, weights left out."""
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
    if precision == "bf16-mixed":  # what autocast keeps to the end of its pass, and autograd not
        cast = config.vocab_size * config.emb_dim + sum(
            p.numel() for n, p in model.named_parameters() if n.endswith("bias") and "norm" not in n
        )
    indices = 16 * 8  # into the positions' embedding, which are not counted
    assert counted.activations + counted.copies - 2 * cast == pytest.approx(
        sum(kept.values()), abs=indices
    )


def allocated_at_peak(shape: StepShape, folder: Path) -> int:
    """Highest number of bytes of tensors in two optimizer steps on the CPU, as torch's profiler records them."""
    dtype, low = PRECISIONS[shape.precision]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model = GPTModel(shape.config).to(dtype)
        model.activation_checkpointing = shape.activation_checkpointing
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
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
        ({"loss_chunk_size": 64}, {}),
        ({"loss_chunk_size": 32, "activation_checkpointing": True, "batch_size": 16}, {}),
        ({"activation_checkpointing": True}, {"vocab_size": 500}),
        ({"precision": "bf16-mixed"}, {}),
        ({"loss_chunk_size": 64, "batch_size": 8}, {"vocab_size": 100, "n_layers": 6}),
        ({}, {"vocab_size": 500, "drop_rate": 0.1}),
        ({"batch_size": 1}, {"vocab_size": 500, "tied_embeddings": True, "qkv_bias": True}),
    ],
    ids=str,
)
def test_a_steps_tensors_take_the_predicted_memory(
    changes: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    """Within 1 % of what a real step allocates on a CPU."""
    architecture = replace(SMALL_CONFIG, context_length=64, emb_dim=64, n_heads=4, **config)
    shape = replace(StepShape(architecture, 4, 64), **changes)
    assert step_memory(shape).total == pytest.approx(allocated_at_peak(shape, tmp_path), rel=0.01)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shards", [1, 4])
def test_a_steps_memory_is_linear_in_windows(accumulate: bool, shards: int) -> None:
    first, second, third = (
        step_memory(
            StepShape(SMALL_CONFIG, b, 16, accumulate=accumulate, shards=shards, device="cuda")
        ).total
        for b in (16, 32, 48)
    )
    assert second - first == pytest.approx(third - second, rel=1e-3)


def test_dropout_on_a_cpu_keeps_the_attention_matrix_and_on_a_gpu_not() -> None:
    """Twice T × T a head, its dropout and both products: in float32 three of them."""
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
    """Which makes 2 + 4 + 4 bytes per logit of the one and 4 + 4 + 4 of the other."""
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
def test_a_gpus_loss_in_autocast_is_ten_bytes_a_logit(precision: str) -> None:
    """Softmax's logarithm in 2, its copy in float32 and the copy's gradient."""
    config = replace(SMALL_CONFIG, vocab_size=20000)
    counted = step_memory(StepShape(config, 32, 16, precision=precision, device="cuda"))
    assert counted.phase == "loss"
    assert counted.loss == pytest.approx(10 * 32 * 16 * config.vocab_size, rel=0.001)
    whole = step_memory(
        StepShape(config, 32, 16, device="cuda")
    )  # softmax, its and logits' gradient
    assert whole.loss == pytest.approx(12 * 32 * 16 * config.vocab_size, rel=0.001)


def test_chunks_and_checkpointing_keep_what_they_promise() -> None:
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


def documented(benchmark: ModuleType) -> list[str]:
    lines = DOC.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| size | devices"))
    return lines[start : start + 2 + 5 * len(GPT2_SIZES)]


def test_documented_table_is_what_plan_counts(benchmark: ModuleType) -> None:
    assert benchmark.table().splitlines() == documented(benchmark)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("run", range(3))
def test_a_runs_memory_is_the_predicted_one(benchmark: ModuleType, run: int) -> None:
    """Within 20 % of the median peak resident set of three runs of ``fit`` with the same settings."""
    settings = list(benchmark.RUNS.values())[run]
    result = benchmark.compare([*benchmark.COMMON, *settings])
    assert abs(result["off"]) <= benchmark.TOLERANCE, result


def gpu_rows() -> dict[str, list[str]]:
    lines = DOC.read_text(encoding="utf-8").split("### On a GPU")[1].splitlines()
    table = [line.strip("|").split("|") for line in lines if line.startswith("|")][2:]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in table}


def test_documented_gpu_runs_are_the_measured_ones(benchmark: ModuleType) -> None:
    results = {
        commit: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
        for commit, name in (("70d1f70", "h200-plan-70d1f70"), ("c42e126", "h200-plan"))
    }
    rows = gpu_rows()
    assert list(rows) == list(benchmark.GPU_RUNS)
    for name, (counted, measured, off, commit, _) in rows.items():
        found = results[commit]["runs"][name]
        assert counted == f"{found['counted'] / 1e9:.2f} GB"
        assert measured == f"{found['measured'] / 1e9:.2f} GB"
        assert off == f"{100 * found['off']:+.1f} %".replace("-", "−")
        assert found["off"] == pytest.approx(found["counted"] / found["measured"] - 1, abs=2e-3)
        assert abs(found["off"]) <= benchmark.TOLERANCE_ON_GPU


@pytest.mark.parametrize("run", range(5))
def test_predicted_memory_is_within_a_tenth_of_recorded_gpu_runs(
    benchmark: ModuleType, command: Command, run: int
) -> None:
    name, settings = list(benchmark.GPU_RUNS.items())[run]
    total = as_json(command, *benchmark.ON_GPU, *settings, "--gpu=H100")["total"]
    _, measured, _, _, shown = gpu_rows()[name]
    assert shown == f"{total / 1e9:.2f} GB"
    assert total == pytest.approx(1e9 * float(measured.split()[0]), rel=benchmark.TOLERANCE_ON_GPU)


def as_json(command: Command, *arguments: str) -> dict[str, Any]:
    done = command("plan", *arguments, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_plan_counts_an_epochs_steps_as_fit_does(command: Command) -> None:
    settings = [QUICKSTART, *SMALL, "--trainer.max_epochs=2", "--data.batch_size=3"]
    found = as_json(command, *settings)
    assert command("fit", *settings).code == 0
    assert (
        found["steps"] == read_checkpoint(Path("checkpoints/quickstart/last.ckpt"))["global_step"]
    )


@pytest.mark.parametrize(
    "settings",
    [
        ["--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=3"],  # an epoch has 7 batches
        ["--trainer.max_steps=4", "--trainer.accumulate_grad_batches=3"],
        ["--trainer.max_epochs=3", "--trainer.limit_train_batches=2"],
        ["--trainer.max_epochs=3", "--trainer.limit_train_batches=0.5"],
        ["--trainer.max_epochs=3", "--trainer.overfit_batches=2"],
        ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--data.global_batch_size=4"],
        ["--trainer.max_epochs=2", "--data.global_batch_size=6"],
        ["--trainer.max_epochs=null", "--max_tokens=500", "--trainer.accumulate_grad_batches=3"],
        ["--trainer.max_epochs=2", "--max_tokens=150", "--trainer.limit_train_batches=3"],
    ],
    ids=" ".join,
)
def test_plan_counts_steps_and_tokens_as_fit_does(command: Command, settings: list[str]) -> None:
    settings = [QUICKSTART, *SMALL, "--data.num_workers=0", *settings]
    found = as_json(command, *settings)
    done = command("fit", *settings, "--evaluation.prompt=null")
    assert done.code == 0, done.err
    last = read_checkpoint(Path("checkpoints/quickstart/last.ckpt"))
    assert (found["steps"], found["tokens"]) == (last["global_step"], last["tokens_seen"])
    assert f"step 0 of {found['steps']} ({found['epochs']:.3g} epochs)" in done.err


def test_plan_says_how_often_the_text_is_seen(command: Command) -> None:
    few = command("plan", QUICKSTART, *SMALL, "--trainer.max_epochs=12").out
    assert "epochs           12 of 7 steps each\n" in few
    many = command(
        "plan", QUICKSTART, *SMALL, "--trainer.max_steps=7756", "--trainer.max_epochs=-1"
    ).out
    assert "epochs           1,108 of 7 steps each; so many passes usually overfit\n" in many


def test_plan_says_what_the_settings_say_and_writes_nothing(command: Command) -> None:
    done = command("plan", QUICKSTART, *SMALL, "--trainer.max_steps=10")
    assert (done.code, done.err) == (0, "")
    for part in ("parameters", "MFLOP per token", "Python and libraries", "activations", "fits"):
        assert part in done.out
    assert os.listdir() == []
    found = as_json(command, QUICKSTART, *SMALL, "--trainer.max_steps=10", "--peak_tflops=0.1")
    assert os.listdir() == []
    assert found["total"] == sum(found["memory"].values())
    assert found["tokens_per_step"] == 2 * 16
    assert (found["tokens"], found["steps"]) == (320, 10)
    assert found["hours"] == pytest.approx(320 * found["flops_per_token"] / (0.1e12 * 0.4) / 3600)


def everything_under(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_epochs_of_a_long_text_or_a_store_are_counted_without_writing(command: Command) -> None:
    """By plan alone, by fit's tokens in the cache, and by a manifest."""
    text = Path("long.txt")
    text.write_text("The quick brown fox is 9 years old.\n" * 32_000, encoding="utf-8")
    settings = [QUICKSTART, *SMALL, "--trainer.max_epochs=1", "--data.stride=20000"]
    before = everything_under(Path())
    found = as_json(command, *settings, "--data.text=long.txt")
    assert everything_under(Path()) == before
    assert command("fit", *settings, "--data.text=long.txt").code == 0
    assert Path("cache/tokens").is_dir()
    steps = read_checkpoint(Path("checkpoints/quickstart/last.ckpt"))["global_step"]
    assert (
        command("prepare", "long.txt", "--out=store", "--split=ratio", "--val_ratio=0.9").code == 0
    )
    before = everything_under(Path())
    assert as_json(command, *settings, "--data.text=long.txt")["steps"] == steps
    stored = as_json(command, *settings, "--data.text=store")
    assert everything_under(Path()) == before
    assert (found["steps"], stored["steps"]) == (steps, steps)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("no.txt", b"caf\xe9", "no.txt is not UTF-8"),
        ("store/manifest.json", b'{"format": "gpt_lightning token store 1"}', "is damaged"),
        ("other.txt", b"there", "nowhere.txt does not exist"),
    ],
)
def test_a_text_that_cannot_be_read_is_said_and_the_rest_counted(
    command: Command, name: str, content: bytes, says: str
) -> None:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    text = "nowhere.txt" if name == "other.txt" else name.split("/")[0]
    settings = [QUICKSTART, *SMALL, "--trainer.max_epochs=1", f"--data.text={text}"]
    found = as_json(command, *settings)
    assert (found["steps"], found["total"] > 0) == (None, True)
    assert says in found["notes"]["text"]
    done = command("plan", *settings)
    assert (done.code, done.err) == (0, "")
    assert [line for line in done.out.splitlines() if line.startswith("text ") and says in line]


def test_what_is_set_and_not_counted_is_said(command: Command) -> None:
    settings = [QUICKSTART, *SMALL, "--trainer.max_steps=1", "--keep_freed_memory=false"]
    assert as_json(command, *settings)["notes"] == {}
    settings += ["--data.document_mask=true", "--model.compile=true"]
    notes = as_json(command, *settings)["notes"]
    assert set(notes) == {"document_mask", "compile"}
    lines = command("plan", *settings).out.splitlines()
    for name, line in notes.items():
        assert any(each.startswith(name) and each.endswith(line) for each in lines)


def test_a_checkpoint_is_as_large_as_predicted(command: Command, fit: Command) -> None:
    arguments = ("--trainer.max_steps=2", "--trainer.max_epochs=-1")
    found = as_json(command, QUICKSTART, *SMALL, *arguments)
    fit("--run=sized", *arguments)
    folder = Path("checkpoints/sized")
    assert (folder / "last.ckpt").stat().st_size == pytest.approx(found["checkpoint"], rel=0.01)
    files = sum(path.stat().st_size for path in folder.glob("*.ckpt"))
    assert files <= found["disk"]


LONG = ["--model.config.context_length=512", "--model.config.emb_dim=256", "--model.config.n_layers=2",
        "--data.batch_size=16", "--trainer.accumulate_grad_batches=2"]  # fmt: skip
WIDE = ["--model.config.emb_dim=256", "--model.config.n_layers=2", "--data.batch_size=1"]


@pytest.mark.parametrize(
    ("settings", "memory_gb", "named"),
    [
        (LONG, 1.6, "--data.batch_size 2 --trainer.accumulate_grad_batches 16"),
        (WIDE, 0.3, "--config configs/fsdp.yaml --trainer.precision 32-true"),
    ],
)
def test_what_does_not_fit_fits_with_what_plan_says(
    command: Command, settings: list[str], memory_gb: float, named: str
) -> None:
    arguments = [
        QUICKSTART, *settings, f"--device_memory_gb={memory_gb}", "--gpu=H100", "--devices=8",
    ]  # fmt: skip
    found = as_json(command, *arguments)
    assert found["fits"] is False
    assert found["total"] > memory_gb * 1e9
    options = " ".join(found["nearest"]["options"])
    assert options == named
    assert options in command("plan", *arguments).out
    fsdp = "trainer: {strategy: {class_path: lightning.pytorch.strategies.ModelParallelStrategy}}"
    Path("fsdp.yaml").write_text(fsdp, encoding="utf-8")
    words = options.replace("configs/fsdp.yaml", "fsdp.yaml").split()
    again = as_json(command, *arguments, *words)
    assert again["fits"] is True
    assert again["total"] == found["nearest"]["total"]
    assert again["tokens_per_step"] == found["tokens_per_step"]


FSDP = f"--config={ROOT}/configs/fsdp.yaml"


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_fsdp_is_not_proposed_with_a_precision_that_fit_refuses_with_it(
    command: Command, precision: str
) -> None:
    arguments = [QUICKSTART, *WIDE, f"--trainer.precision={precision}", "--gpu=T4", "--devices=8"]
    found = as_json(command, *arguments, "--device_memory_gb=0.3")
    assert found["fits"] is False
    assert found["nearest"] is None or "configs/fsdp.yaml" not in str(found["nearest"]["options"])
    assert "FSDP2" not in command("plan", *arguments, "--device_memory_gb=0.3").out


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_fsdp_with_a_precision_that_fit_refuses(command: Command, precision: str) -> None:
    settings = [QUICKSTART, FSDP, *SMALL, f"--trainer.precision={precision}"]
    done, fits = command("plan", *settings, "--devices=2"), command("fit", *settings)
    assert (done.code, done.out) == (2, "")
    assert done.err == fits.err


def test_what_cannot_fit_is_said_with_what_remains(command: Command) -> None:
    arguments = (
        QUICKSTART, "--gpu=T4", "--device_memory_gb=0.01", "--data.batch_size=8",
        "--model.activation_checkpointing=true",
    )  # fmt: skip
    found = as_json(command, *arguments)
    assert (found["fits"], found["nearest"]) == (False, None)
    assert 0.01e9 < found["least"] < found["total"]
    assert "nor with all changes that plan knows" in command("plan", *arguments).out


def test_weights_in_float16_are_stepped_without_fusing() -> None:
    """The optimizer that is not fused takes one more value per weight, which shows in the smallest step."""
    step = StepShape(replace(SMALL_CONFIG, n_layers=1), 1, 1, precision="16-mixed", device="cuda")
    lines, when = memory(RunSpec(step))
    assert when == "optimizer step"
    assert lines["optimizer step"] == lines["weights"]


def test_time_is_divided_by_devices_and_memory_is_not_told_where_it_is_not_known() -> None:
    step = StepShape(SMALL_CONFIG, 2, 16, device="cuda")
    one = plan(RunSpec(step), tokens=10_000, peak_flops=1e12, mfu=0.5)
    eight = plan(RunSpec(step, devices=8, strategy="ddp"), tokens=10_000, peak_flops=1e12, mfu=0.5)
    assert one.hours is not None
    assert eight.hours == pytest.approx(one.hours / 8)
    assert (one.steps, eight.steps) == (ceil(10_000 / 32), ceil(10_000 / 256))
    assert one.fits is None
    assert eight.total - one.total == one.memory["weights"]  # DDP's buckets


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_model_of_6_gigabytes_is_planned_in_one(benchmark: ModuleType, tmp_path: Path) -> None:
    done = python(
        "-c", benchmark.CHILD, "plan", f"--config={ROOT}/configs/gpt2.yaml",
        "--init_from=gpt2-1558M", "--gpu=H100", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, peak = done.stdout.splitlines()
    assert json.loads(found)["memory"]["weights"] > 6e9
    assert int(peak) < 1e9
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--devices=0"], "devices: 0 is out of range"),
        (["--train_tokens=-5"], "train_tokens: -5 is out of range"),
        (["--peak_tflops=0"], "peak_tflops: 0.0 is out of range"),
        (["--device_memory_gb=.inf"], "device_memory_gb: inf is not a finite number"),
        (["--mfu=2"], "mfu: 2.0 is not a share"),
        (["--device_memory_gb=none"], "device_memory_gb"),
        (["--gpu=H1000"], "did you mean H100?"),
        (["--trainer.strategy=deepspeed"], "to shard the model, give --config configs/fsdp.yaml"),
        (["--trainer.precision=transformer-engine"], "trainer.precision: plan does not know"),
        (["--trainer.accelerator=tpu"], "trainer.accelerator: tpu is unknown"),
        (["--data.context_length=4096"], "data.context_length: 4096 is more than the model's"),
        (["--model.loss_chunk_size=0"], "model.loss_chunk_size: 0 is too small"),
        (["--model.config.n_heads=3"], "is not divisible by n_heads 3"),
        (["--mdoel.lr=1"], "did you mean model.lr?"),
        (["--init_from=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(command: Command, arguments: list[str], says: str) -> None:
    done = command("plan", QUICKSTART, *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("gpt_lightning: error: ")
    assert done.err.count("\n") == 1
    assert says in done.err
    assert os.listdir() == []


def test_every_figure_of_the_recipe_has_a_source() -> None:
    text = PRETRAIN.read_text(encoding="utf-8")
    settings = [line for line in text.splitlines() if line.startswith("  ") and ": " in line]
    sources = r"\[(GPT-2|GPT-3|nanoGPT|llm\.c|Chinchilla)\]|GPT-2's released|375 million|the complete run|our value|no limit|the output of"
    for line in settings:
        assert re.search(sources, line.partition("#")[2]), line


@pytest.mark.parametrize(("devices", "micro_batches"), [(1, 32), (8, 4), (32, 1)])
def test_the_recipe_has_the_same_global_batch_on_any_devices(
    command: Command, devices: int, micro_batches: int
) -> None:
    found = as_json(command, f"--config={PRETRAIN}", "--gpu=H100", f"--devices={devices}")
    assert found["parameters"] == 124_439_808
    assert found["tokens_per_step"] == 524_288
    assert found["settings"]["micro_batches"] == micro_batches
    assert found["fits"]


def test_a_gpu_that_does_not_run_our_kernels_holds_more(command: Command) -> None:
    """A chunk's logits in float32, beside them as they were multiplied."""
    old, new = (
        as_json(command, f"--config={PRETRAIN}", f"--gpu={gpu}", "--trainer.precision=bf16-mixed")
        for gpu in ("V100", "A100")
    )
    chunk = 8192 * 50304
    assert 2 * chunk < old["total"] - new["total"] < 10 * chunk


def test_the_recipes_header_says_what_plan_counts(command: Command) -> None:
    header = PRETRAIN.read_text(encoding="utf-8").partition("\nrun:")[0]
    said = re.search(
        r"Time: (\d+) hours on one H100, which `plan` estimates at 40 % of its peak",
        header,
    )
    memory = re.search(
        r"estimates ([\d.]+) GB of memory on one device and\n# ([\d.]+) GB on each of eight", header
    )
    assert said is not None
    assert memory is not None
    one, eight = (
        as_json(command, f"--config={PRETRAIN}", "--gpu=H100", f"--devices={devices}")
        for devices in (1, 8)
    )
    assert memory.groups() == (f"{one['total'] / 1e9:.1f}", f"{eight['total'] / 1e9:.1f}")
    assert said.groups() == (f"{one['hours']:.0f}",)
    named = set(re.findall(r"\[([\w. -]+)\]", header))
    assert named == set(re.findall(r"^#   \[([\w. -]+)\]", header, re.M))


@pytest.mark.parametrize(
    ("value", "step", "most", "nearest"),
    [(5, 2, None, 6), (5, 2, 5, 4), (1, 4, 7, 4), (7, 3, 15, 6), (9, 2, 9, 8), (3, 4, None, 4)],
)
def test_the_nearest_batch(value: int, step: int, most: int | None, nearest: int) -> None:
    assert nearest_multiple(value, step, most) == nearest


def test_fit_and_plan_name_the_same_nearest_batch(command: Command) -> None:
    settings = [QUICKSTART, *SMALL]
    for batch, nearest in (("size=5", "6"), ("tokens=100", "96"), ("tokens=80", "96")):
        arguments = [*settings, f"--data.global_batch_{batch}"]
        said = command("fit", *arguments).err, command("plan", *arguments).err
        assert said[0].rstrip().endswith(nearest)
        assert said[1] == said[0]


def test_fit_and_plan_refuse_an_accumulation_that_contradicts_the_global_batch(
    command: Command,
) -> None:
    arguments = [QUICKSTART, *SMALL, "--data.global_batch_size=4",
                 "--trainer.accumulate_grad_batches=3"]  # fmt: skip
    said = command("fit", *arguments).err, command("plan", *arguments).err
    assert said[0].startswith(
        "gpt_lightning: error: trainer.accumulate_grad_batches: 3 contradicts"
    )
    assert said[1] == said[0]


def test_a_nearest_batch_is_of_no_more_windows_than_there_are(command: Command) -> None:
    arguments = [QUICKSTART, *SMALL, "--data.stride=130", "--data.global_batch_size=5"]
    assert (
        as_json(command, *arguments[:-1], "--trainer.max_epochs=1", "--data.batch_size=1")["steps"]
        == 5
    )
    assert command("fit", *arguments).err.rstrip().endswith("the nearest that can is 4")


def test_a_batch_that_does_not_divide_the_global_one(command: Command) -> None:
    done = command("plan", f"--config={PRETRAIN}", "--gpu=H100", "--data.batch_size=24")
    assert done.code == 2
    assert (
        "data.global_batch_tokens: 524288 cannot be split over 1 device(s) with a batch_size of 24; "
        "the nearest that can is 516096" in done.err
    )


def test_the_recipe_runs_on_one_device(fit: Command, command: Command) -> None:
    """As it is but for its size: a model and a text that train in a second."""
    done = command(
        "fit", f"--config={PRETRAIN}", *SMALL, "--trainer.max_steps=2", "--model.warmup_steps=1",
        "--model.decay_steps=2", "--model.compile=false", "--data.global_batch_tokens=128",
        "--data.num_workers=0", "--evaluation.eval_freq=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (Path("checkpoints/pretrain-124M") / "last.ckpt").exists()
