"""What makes training faster or smaller equals what is plain; costs and throughput are counted right."""

import itertools
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import ROOT, SMALL, Command, python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.model import flops, gpt
from gpt_lightning.model import loss as loss_module
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.gpt import explicit_causal_attention
from gpt_lightning.model.hardware import PEAKS, gpu_value
from gpt_lightning.model.loss import chunked_cross_entropy, cross_entropy
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training import evaluation, hardware, module, throughput
from gpt_lightning.training.checkpoint_callback import CheckpointCallback
from gpt_lightning.training.evaluation import EvaluationCallback
from gpt_lightning.training.hardware import measured_peak
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.optimizer import global_grad_norm
from gpt_lightning.training.throughput import Stopwatch, speed_metrics


@pytest.mark.parametrize("chunk_size", [1, 7, 24, 1000])
@pytest.mark.parametrize("pad_vocabulary", [False, True])
def test_loss_by_chunks_is_the_loss(chunk_size: int, pad_vocabulary: bool) -> None:
    """Value and gradients to 1e-5, in float32 and under autocast to what bfloat16 keeps."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, 16, generator=generator)
    w = torch.randn(301, 16, generator=generator) * 0.3
    targets = torch.randint(301, (2, 12), generator=generator)
    for autocast, tolerance in [(False, 1e-5), (True, 1e-2)]:
        found = []
        for chunked in (False, True):
            features, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if chunked:
                    loss = chunked_cross_entropy(
                        features, weight, targets, chunk_size, pad_vocabulary=pad_vocabulary
                    )
                else:
                    loss = cross_entropy(torch.nn.functional.linear(features, weight), targets)
            (3 * loss).backward()
            found.append([loss.detach(), features.grad, weight.grad])
        for plain, by_chunks in zip(*found, strict=True):
            torch.testing.assert_close(by_chunks, plain, atol=tolerance, rtol=tolerance)


def test_float64_stays_float64() -> None:
    """The loss by chunks, its gradients, and the gradients' norm."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, 16, generator=generator, dtype=torch.float64)
    w = torch.randn(301, 16, generator=generator, dtype=torch.float64)
    targets = torch.randint(301, (2, 12), generator=generator)
    found = []
    for chunk_size in (None, 7):
        features, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
        if chunk_size is None:
            loss = cross_entropy(torch.nn.functional.linear(features, weight), targets)
        else:
            loss = chunked_cross_entropy(features, weight, targets, chunk_size)
        loss.backward()
        found.append([loss.detach(), features.grad, weight.grad])
    for plain, by_chunks in zip(*found, strict=True):
        torch.testing.assert_close(by_chunks, plain, atol=1e-14, rtol=1e-13)
    exact = torch.cat([x.flatten(), w.flatten()]).norm()
    torch.testing.assert_close(global_grad_norm([x, w]), exact, atol=0, rtol=1e-14)


def test_a_run_in_float64_has_its_loss_by_chunks(fit: Command) -> None:
    settings = ["--trainer.precision=64-true", "--trainer.max_steps=5", "--trainer.gradient_clip_val=0.5",
                "--evaluation.eval_freq=1"]  # fmt: skip
    fit("--run=whole", *settings)
    fit("--run=chunks", *settings, "--model.loss_chunk_size=7")
    whole, chunks = (
        read_checkpoint(Path(f"checkpoints/{run}/last.ckpt")) for run in ("whole", "chunks")
    )
    for name, tensor in whole["state_dict"].items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(chunks["state_dict"][name], tensor, atol=1e-12, rtol=1e-9)
    # as they are, also where another run begins with them
    fit(
        "--run=again",
        *settings,
        "--init_from=checkpoints/whole",
        "--model.lr=0",
        "--model.warmup_steps=0",
    )
    again = read_checkpoint(Path("checkpoints/again/last.ckpt"))["state_dict"]
    assert all(torch.equal(again[name], tensor) for name, tensor in whole["state_dict"].items())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("pad_vocabulary", [False, True])
def test_gradients_by_chunks_in_bf16_are_exact(device: str, pad_vocabulary: bool) -> None:
    """Of many chunks, under autocast as ``fit`` takes it, to what bfloat16 keeps of what is multiplied."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 64, 64, generator=generator)
    w = torch.randn(301, 64, generator=generator) * 0.3
    targets = torch.randint(301, (4, 64), generator=generator).to(device)
    exact = [t.to(device, torch.bfloat16).double().requires_grad_() for t in (x, w)]
    cross_entropy(exact[0] @ exact[1].t(), targets).backward()
    own = [t.to(device).requires_grad_() for t in (x, w)]
    with torch.autocast(device, torch.bfloat16):
        chunked_cross_entropy(*own, targets, 50, pad_vocabulary=pad_vocabulary).backward()
    for found, expected in zip(own, exact, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        off = (found.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert off < 5e-3


def test_loss_by_chunks_in_bf16_is_as_exact_as_whole() -> None:
    """However many the chunks: their gradients by the head's weight are summed in float32."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 2048, 16, generator=generator).bfloat16()
    w = (torch.randn(100, 16, generator=generator) * 0.3).bfloat16()
    targets = torch.randint(100, (1, 2048), generator=generator)
    exact = w.float().requires_grad_()
    cross_entropy(x.float() @ exact.t(), targets).backward()
    errors = []
    for chunk_size in (None, 1024, 4):
        weight = w.clone().requires_grad_()
        if chunk_size is None:
            cross_entropy(x @ weight.t(), targets).backward()
        else:
            chunked_cross_entropy(x, weight, targets, chunk_size).backward()
        assert weight.grad is not None
        assert weight.grad.dtype == torch.bfloat16
        errors.append(float((weight.grad.float() - exact.grad).norm() / exact.grad.norm()))
    assert max(errors[1:]) < 1.5 * errors[0], errors


def test_a_chunk_is_no_larger_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    add = loss_module._add_gradients
    monkeypatch.setattr(
        loss_module, "_add_gradients", lambda by, *rest: (rows.append(len(by)), add(by, *rest))
    )
    features = torch.randn(2, 12, 8, requires_grad=True)
    chunked_cross_entropy(features, torch.randn(30, 8), torch.zeros(2, 12, dtype=torch.int64), 7)
    assert rows == [7, 7, 7, 3]


def test_loss_by_chunks_holds_no_logits() -> None:
    """What stays for the backward pass is of the features' and the weight's shape."""
    x = torch.randn(1, 512, 8, requires_grad=True)
    w = torch.randn(5000, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        chunked_cross_entropy(x, w, torch.zeros(1, 512, dtype=torch.int64), 64)
    assert max(kept) <= max(x.numel(), w.numel())


def test_loss_by_chunks_in_float16_keeps_small_gradients() -> None:
    """A scaler's factor comes after the gradients are computed: what float16 had lost would stay lost."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 256, 16, generator=generator, requires_grad=True)
    w = (torch.randn(20000, 16, generator=generator) * 0.02).requires_grad_()
    targets = torch.zeros(2, 256, dtype=torch.int64)
    grads = []
    for half in (False, True):
        w.grad = None
        with torch.autocast("cpu", torch.float16, enabled=half):
            chunked_cross_entropy(x, w, targets, 100).backward()
        grads.append(w.grad[1:])  # of rows that are no target
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-2, atol=1e-9)


def test_an_evaluation_computes_no_gradient() -> None:
    x, w = torch.randn(1, 6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        chunked_cross_entropy(x, w, torch.arange(6)[None], 3)
    assert counter.get_total_flops() == 2 * 6 * 8 * 50


def test_no_gradient_is_computed_where_none_is_asked_for() -> None:
    x, w = torch.randn(1, 6, 8), torch.randn(50, 8)
    targets = torch.arange(6)[None]
    loss = chunked_cross_entropy(x, w, targets, 4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, cross_entropy(x @ w.t(), targets))


def trained(fit: Command, name: str, *arguments: str) -> list[torch.Tensor]:
    fit(f"--run={name}", "--trainer.max_steps=20", "--trainer.max_epochs=-1", *arguments)
    checkpoint = read_checkpoint(Path("checkpoints") / name / "last.ckpt")
    return [tensor.clone() for tensor in checkpoint["state_dict"].values()]


@pytest.mark.parametrize(
    ("arguments", "module", "does_it", "exact"),
    [
        (["--model.loss_chunk_size=10"], module, "chunked_cross_entropy", False),
        (["--model.activation_checkpointing=true"], gpt, "checkpoint", True),
    ],
)
def test_twenty_steps_are_those_of_the_plain_way(
    fit: Command,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    module: ModuleType,
    does_it: str,
    exact: bool,
) -> None:
    """And they are taken in the other way: by ``does_it``, which the plain one never calls."""
    settings = ["--model.config.drop_rate=0.1", "--model.warmup_steps=0", "--model.lr=0.0001"]
    called = mock.Mock(side_effect=getattr(module, does_it))
    monkeypatch.setattr(module, does_it, called)
    plain = trained(fit, "plain", *settings)
    assert not called.called
    other = trained(fit, "other", *settings, *arguments)
    assert called.call_count >= 20
    for ours, theirs in zip(other, plain, strict=True):
        if exact:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("length", [2, 33, 512])
def test_explicit_attention_is_attention(length: int) -> None:
    """Values and gradients to 1e-5 of torch's, in float32; the same tokens are hidden."""
    generator = torch.Generator().manual_seed(3)
    found = []
    parts = [torch.randn(2, 3, length, 8, generator=generator) for _ in range(3)]
    for attention in (
        lambda q, k, v: explicit_causal_attention(q, k, v, 0.0),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    ):
        q, k, v = (part.clone().requires_grad_() for part in parts)
        y = attention(q, k, v)
        y.square().sum().backward()
        found.append([y, q.grad, k.grad, v.grad])
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)


def test_explicit_attention_drops_weights() -> None:
    q = torch.zeros(4, 4, 64, 8)  # all weights of a row alike
    v = torch.ones(4, 4, 64, 8)
    torch.manual_seed(0)
    y = explicit_causal_attention(q, q, v, 0.25)
    assert y.mean() == pytest.approx(1.0, abs=0.02)
    assert y[:, :, 0, 0].unique().tolist() == [0.0, pytest.approx(4 / 3)]


@pytest.mark.parametrize("chunk", [None, 24])
@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
def test_twenty_steps_in_bf16_are_those_of_float32(chunk: int | None, drop_rate: float) -> None:
    """To what 8 bits of mantissa keep of a loss; with dropout further off, for it draws other numbers."""
    config = GPTConfig(vocab_size=211, context_length=32, emb_dim=32, n_heads=4, n_layers=2,
                       drop_rate=drop_rate, tied_embeddings=True)  # fmt: skip
    ids = torch.randint(211, (4, 33), generator=torch.Generator().manual_seed(1))
    losses = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = GPTModel(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                if chunk is None or not bf16:
                    loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
                else:
                    features = model.features(ids[:, :-1])
                    loss = chunked_cross_entropy(features, model.head_weight, ids[:, 1:], chunk)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    float32, half = losses[:20], losses[20:]
    assert float32[0] - float32[-1] > 0.1  # it learns
    assert half == pytest.approx(float32, abs=0.01 if drop_rate == 0.0 else 0.1)


@pytest.mark.slow
def test_compiled_blocks_are_the_plain_ones(fit: Command, tmp_path: Path) -> None:
    """Without dropout, of which compiled code draws numbers of its own. As a process: torch's compiler
    warns of itself, and here warnings are errors."""
    settings = ["--model.config.drop_rate=0", "--model.warmup_steps=0", "--model.lr=0.0001"]
    plain = trained(fit, "plain", *settings)
    done = python("-m", "gpt_lightning", "fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL,
                  "--run=compiled", "--trainer.max_steps=20", "--trainer.max_epochs=-1", *settings,
                  "--model.compile=true", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    compiled = read_checkpoint(Path("checkpoints/compiled/last.ckpt"))["state_dict"]
    for ours, theirs in zip(compiled.values(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("chunk", [[], ["--model.loss_chunk_size=10"]])
def test_a_run_in_float64(fit: Command, chunk: list[str]) -> None:
    fit("--trainer.max_steps=2", "--trainer.precision=64-true", "--trainer.gradient_clip_val=1",
        *chunk)  # fmt: skip
    weights = read_checkpoint(Path("checkpoints/quickstart/last.ckpt"))["state_dict"].values()
    assert all(weight.dtype == torch.float64 for weight in weights)


def test_attention_dropout_apart(fit: Command) -> None:
    config = GPTConfig(drop_rate=0.1, attn_drop_rate=0.0, emb_dim=32, n_heads=2, n_layers=1)
    assert GPTModel(config).trf_blocks[0].att.drop_rate == 0.0
    assert GPTModel(config).trf_blocks[0].drop_shortcut.p == 0.1
    assert GPTConfig(drop_rate=0.2).attention_drop_rate == 0.2
    with pytest.raises(ValueError, match="attn_drop_rate"):
        GPTConfig(attn_drop_rate=1.5)
    fit("--trainer.max_steps=1", "--model.config.attn_drop_rate=0.0")
    fit("--trainer.max_steps=2", "--model.config.attn_drop_rate=0.1", "--ckpt_path=last")


# --- costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "padded", "expected"),
    [("gpt2-124M", 50304, 854.7e6), ("gpt2-1558M", 50304, 10.274e9)],
)
def test_flops_are_what_is_counted(name: str, padded: int, expected: float) -> None:
    """By FlopCounterMode on the meta device: nothing is computed."""
    config = GPT2_SIZES[name]
    config = GPTConfig(**{**vars(config), "vocab_size": padded, "drop_rate": 0.0})
    with torch.device("meta"):
        model = GPTModel(config)
        ids = torch.zeros(1, 1024, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    ours = flops.flops_per_token(config, 1024)
    assert ours == counter.get_total_flops() / 1024
    assert ours == pytest.approx(expected, rel=1e-4)
    assert flops.flops_per_token(GPT2_SIZES[name], 1024, vocab_size=padded) == ours
    assert flops.flops_per_token(config, 1024, training=False) * 3 == ours


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_parameters(tied: bool, qkv_bias: bool) -> None:
    config = GPTConfig(vocab_size=300, context_length=20, emb_dim=24, n_heads=2, n_layers=3,
                       qkv_bias=qkv_bias, tied_embeddings=tied)  # fmt: skip
    assert flops.parameters(config) == sum(p.numel() for p in GPTModel(config).parameters())
    assert [flops.parameters(c) for c in GPT2_SIZES.values()] == [
        124439808, 354823168, 774030080, 1557611200]  # fmt: skip


# --- throughput -----------------------------------------------------------------------------------


def test_arithmetic() -> None:
    found = speed_metrics(tokens=10_000, steps=5, seconds=2.0, loading_seconds=0.5,
                    flops_per_token=1_000_000, peak=20e9)  # fmt: skip
    assert found == {
        "throughput/tokens_per_second": 5000.0,
        "throughput/step_time": 0.4,
        "throughput/data_wait_fraction": 0.25,
        "throughput/mfu": 0.25,
    }
    assert "throughput/mfu" not in speed_metrics(
        tokens=1, steps=1, seconds=1.0, loading_seconds=0.0, flops_per_token=1, peak=None
    )


def test_a_stopped_clock_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    clock = Stopwatch()
    began = clock.seconds()
    now[0] += 2
    with clock.stopped(torch.device("cpu")):
        now[0] += 50
    now[0] += 3
    assert clock.seconds() - began == 5


def test_the_clock_stands_while_a_run_does_not_train(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of work takes so many seconds more; a step's are those of training, which takes 1."""
    now = 0.0
    done = set()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now))

    def takes(owner: Any, name: str, seconds: float) -> None:
        plain = getattr(owner, name)

        def slow(*arguments: Any, **settings: Any) -> Any:
            nonlocal now
            now += seconds
            done.add(name)
            return plain(*arguments, **settings)

        monkeypatch.setattr(owner, name, slow)

    monkeypatch.setattr(hardware, "measured_peak", lambda dtype: 1e9)
    kinds = [
        (hardware, "measured_peak"),
        (EvaluationCallback, "_mean_loss"),
        (evaluation, "entropy"),
        (evaluation, "generate"),
        (CheckpointCallback, "_save"),
        (GPTLightningModule, "validation_step"),
    ]
    for number, (owner, name) in enumerate(kinds):
        takes(owner, name, 10.0 * 2**number)
    takes(GPTLightningModule, "training_step", 1.0)
    # an epoch has 15 updates
    fit("--trainer.max_steps=34", "--trainer.max_epochs=-1", "--throughput.every_n_steps=1",
        "--evaluation.eval_freq=1", "--evaluation.log_next_token=true", "--trainer.limit_val_batches=2",
        "--checkpoint.every_n_train_steps=3")  # fmt: skip
    assert done == {"training_step", *(name for _, name in kinds)}
    events = EventAccumulator("checkpoints/quickstart").Reload()
    steps = [event.value for event in events.Scalars("throughput/step_time")]
    assert len(steps) == 33
    assert set(steps) == {1.0}
    rates = [event.value for event in events.Scalars("tokens_per_second")]
    assert set(rates[1:]) <= {16.0, 32.0}  # the last batch of an epoch has one window


def test_what_a_run_logs(fit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "measured_peak", lambda dtype: 1e9)
    fit("--trainer.max_steps=14", "--trainer.max_epochs=-1", "--throughput.every_n_steps=4",
        "--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_train_steps=1")  # fmt: skip
    events = EventAccumulator("checkpoints/quickstart").Reload()

    def logged(tag: str) -> Any:
        return {e.step: e.value for e in events.Scalars(f"throughput/{tag}")}

    rates = logged("tokens_per_second")
    assert list(rates) == [4, 8, 12]  # the first update is not counted
    for step, seconds in logged("step_time").items():
        assert 0 < seconds < 5
        # an epoch's last update has one batch, not two
        assert rates[step] * seconds * 4 in (
            pytest.approx(2 * 2 * 16 * 4),
            pytest.approx(2 * 16 * 7),
        )
    assert all(0 <= share < 0.5 for share in logged("data_wait_fraction").values())
    config = GPTConfig(context_length=16, emb_dim=16, n_heads=2, n_layers=2)
    for step, share in logged("mfu").items():
        assert share == pytest.approx(
            rates[step] * flops.flops_per_token(config, 16) / 1e9, rel=1e-4
        )
    assert all(0.05 < gigabytes < 20 for gigabytes in logged("peak_memory_gb").values())


def test_a_profiler_that_is_asked_for_measures(fit: Command) -> None:
    done = fit("--trainer.max_steps=2", "--trainer.profiler=simple")
    assert done.err.count("[Callback]SkipBadSteps.on_before_optimizer_step") == 1


def test_peaks() -> None:
    assert gpu_value(PEAKS, "NVIDIA H100 80GB HBM3") == 989e12
    assert gpu_value(PEAKS, "NVIDIA H100 PCIe") == 756e12
    assert gpu_value(PEAKS, "NVIDIA L4") == 121e12
    assert [
        gpu_value(PEAKS, f"NVIDIA {name}") for name in ("L40", "T400", "RTX A1000", "A10G")
    ] == [None] * 4
    assert gpu_value(PEAKS, "NVIDIA H100 NVL") == 835e12
    less = ["H200 NVL", "H100 80GB HBM3 MIG 1g.10gb", "H100 NVL MIG 1g.12gb", "A100-SXM4-40GB MIG 3g.20gb",
            "GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 D"]  # fmt: skip
    assert [gpu_value(PEAKS, f"NVIDIA {name}") for name in less] == [None] * len(less)
    assert PEAKS["H100"] == 989e12  # dense, not the sparse figure
    assert list(PEAKS).index("H100 PCIe") < list(PEAKS).index("H100")
    assert list(PEAKS).index("L40S") < list(PEAKS).index("L4")
    assert measured_peak(torch.float32, 256) > 1e8
    assert math.isfinite(measured_peak(torch.bfloat16, 256))


@pytest.mark.parametrize(("each", "size"), [(1.0, 96), (1e-6, 300)])
def test_the_peak_is_measured_by_what_is_quick(
    monkeypatch: pytest.MonkeyPatch, each: float, size: int
) -> None:
    """A product that takes a second is not followed by a larger one."""
    clock = itertools.count(step=each)
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert measured_peak(torch.float32, 300) == pytest.approx(2 * size**3 / each)
