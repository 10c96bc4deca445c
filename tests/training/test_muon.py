"""Muon, and other optimizers than AdamW: their steps, settings, saved state and resume."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.model.flops import muon_flops, parameters
from gpt_lightning.training.muon import AdjustLR, Muon, lr_adjustment, orthogonalize
from gpt_lightning.training.optimizer import OptimizerConfig
from helpers import SMALL_QUICKSTART, Command, assert_refused
from runs import same_checkpoints

SGD = "{class_path: torch.optim.SGD, init_args: {momentum: 0.9}}"
MUON = "--model.optimizer=muon"


def reference_direction(matrix: np.ndarray) -> np.ndarray:
    """Newton–Schulz by numpy in float64."""
    X = matrix / np.sqrt((matrix**2).sum())
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if tall else X


def reference_step(
    weight: np.ndarray, gradient: np.ndarray, buffer: np.ndarray, adjust_lr: str, **s: float
) -> tuple[np.ndarray, np.ndarray]:
    """One step on one matrix by numpy: the new weight and momentum."""
    buffer = s["momentum"] * buffer + (1 - s["momentum"]) * gradient
    nesterov = (1 - s["momentum"]) * gradient + s["momentum"] * buffer
    rows, columns = weight.shape
    factor = math.sqrt(max(1, rows / columns))
    if adjust_lr == "match_rms_adamw":
        factor = 0.2 * math.sqrt(max(rows, columns))
    direction = reference_direction(nesterov)
    weight = weight * (1 - s["lr"] * s["weight_decay"]) - s["lr"] * factor * direction
    return weight, buffer


def muon_over(
    parameter: nn.Parameter,
    chunks: int = 1,
    *,
    dtype: torch.dtype = torch.float64,
    adjust_lr: AdjustLR = "original",
    **settings: float,
) -> Muon:
    values = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, **settings}
    group = {"params": [parameter], "chunks": chunks, "adjust_lr": adjust_lr, **values}
    return Muon([group], product_dtype=dtype, betas=(0.9, 0.95), fused=True)


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(
    ("shape", "chunks"), [((12, 12), 1), ((8, 24), 1), ((40, 10), 1), ((36, 12), 3), ((12, 20), 3)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_steps_equal_a_float64_reference(
    shape: tuple[int, int],
    chunks: int,
    adjust_lr: AdjustLR,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Query, key and value are three matrices: each has its own direction and its own shape."""
    generator = torch.Generator().manual_seed(math.prod(shape) + chunks)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(start.to(dtype, copy=True))
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = muon_over(parameter, chunks, dtype=dtype, adjust_lr=adjust_lr, **settings)
    expected = [(part.numpy(), np.zeros(part.shape)) for part in start.chunk(chunks)]
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.to(dtype)
        optimizer.step()
        expected = [
            reference_step(weight, part.numpy(), buffer, adjust_lr, **settings)
            for (weight, buffer), part in zip(expected, gradient.chunk(chunks), strict=True)
        ]
    weights = torch.from_numpy(np.concatenate([weight for weight, _ in expected]))
    torch.testing.assert_close(parameter.data.double(), weights, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_steps_on_plain_matrices_are_those_of_torch(
    shape: tuple[int, int], adjust_lr: AdjustLR
) -> None:
    """With products in bfloat16, where a rounding error is 0.4 % of a step."""
    torch.manual_seed(1)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    optimizers = (
        muon_over(ours, dtype=torch.bfloat16, adjust_lr=adjust_lr, lr=0.1),
        torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn=adjust_lr),
    )
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    step = 0.1 * lr_adjustment(adjust_lr, *shape)
    torch.testing.assert_close(ours, theirs, atol=0.01 * step, rtol=0)


def test_singular_values_become_about_1() -> None:
    torch.manual_seed(2)
    for shape in [(3, 20, 20), (1, 10, 50), (2, 50, 10)]:
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, dtype=torch.float64)))
        assert values.max() < 1.3
        assert values.median() > 0.6
    assert not orthogonalize(torch.zeros(1, 4, 6)).any()


def test_bad_step_on_a_gpu_changes_nothing() -> None:
    """``found_inf`` is how SkipBadSteps tells a fused optimizer to skip a step without waiting for the GPU."""
    torch.manual_seed(3)
    parameter = nn.Parameter(torch.randn(6, 4))
    optimizer = muon_over(parameter, dtype=torch.float32)
    parameter.grad = torch.randn(6, 4)
    optimizer.step()
    before = parameter.detach().clone(), optimizer.state[parameter]["momentum_buffer"].clone()
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    parameter.grad[2, 1] = math.nan
    optimizer.step()
    assert torch.equal(parameter, before[0])
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], before[1])
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    parameter.grad = torch.randn(6, 4)
    optimizer.step()
    assert not torch.equal(parameter, before[0])


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_of_the_blocks_belong_to_muon(tied: bool) -> None:
    config = GPTConfig(
        vocab_size=50, context_length=8, emb_dim=16, n_heads=2, n_layers=2,
        qkv_bias=True, tied_embeddings=tied,
    )  # fmt: skip
    model = GPTModel(config)
    settings = OptimizerConfig(optimizer="muon", lr=1e-3, muon_lr=0.02, decay_matrices_only=True)
    optimizer = settings.build(model)
    groups = optimizer.param_groups
    muon = {name: g["chunks"] for g in groups if "chunks" in g for name in g["param_names"]}
    assert muon == {
        f"trf_blocks.{i}.{name}.weight": 3 if "qkv" in name else 1
        for i in range(2)
        for name in ("att.qkv", "att.out_proj", "ff.layers.0", "ff.layers.2")
    }
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0, 0.1, 0.1]
    assert [g["lr"] for g in groups] == [1e-3, 1e-3, 0.02, 0.02]


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", "muon", "SGD", "torch.optim.NAdam", "Adafactor",
     {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}],
)  # fmt: skip
def test_counted_state_is_what_a_step_makes(optimizer: str) -> None:
    config = GPTConfig(vocab_size=64, context_length=64, emb_dim=64, n_heads=2, n_layers=2)
    model = GPTModel(config)
    settings = OptimizerConfig(optimizer=optimizer)
    built = settings.build(model)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    built.step()
    saved = sum(
        value.numel()
        for state in built.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()
    )
    # Adafactor saves rows and columns: the count is that of a square matrix
    tolerance = 0.05 * parameters(config) if optimizer == "Adafactor" else 0
    assert abs(settings.state_values(config) - saved) <= tolerance


def test_flops_of_muon_for_the_124M_model() -> None:
    gpt2 = GPTConfig(emb_dim=768, n_layers=12, n_heads=12)
    assert muon_flops(gpt2) == pytest.approx(1.63e12, rel=0.01)
    C = 768  # by the shapes of one block: query, key, value, out_proj; two of the feed-forward network
    block = 4 * 5 * 6 * C**3 + 2 * 5 * (4 * C * C * 4 * C + 2 * C**3)
    assert muon_flops(gpt2) == 12 * block


@pytest.mark.parametrize("optimizer", ["muon", SGD])
def test_resumed_run_has_the_bits_of_one_that_never_stopped(fit: Command, optimizer: str) -> None:
    settings = (f"--model.optimizer={optimizer}", "--model.lr=0.01", "--model.warmup_steps=2",
                "--model.ema_decay=0.9")  # fmt: skip
    fit(*settings, "--run=whole", "--trainer.max_steps=8")
    fit(*settings, "--run=parts", "--trainer.max_steps=3")
    fit(*settings, "--run=parts", "--trainer.max_steps=8", "--ckpt_path=last")
    assert same_checkpoints("whole", "parts")


def test_muon_follows_the_schedule_and_its_settings_may_change(fit: Command) -> None:
    """A resumed run has the settings that it is resumed with, as with AdamW."""
    common = (MUON, "--model.lr=0.01", "--model.warmup_steps=4")
    fit(*common, "--model.muon_lr=0.03", "--trainer.max_steps=2")
    path = Path("checkpoints/quickstart/last.ckpt")
    groups = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.005, 0.015, 0.015])
    fit(*common, "--model.muon_lr=0.02", "--model.muon_momentum=0.8", "--trainer.max_steps=3",
        "--ckpt_path=last")  # fmt: skip
    groups = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.0075, 0.015, 0.015])
    assert [group.get("momentum") for group in groups] == [None, 0.8, 0.8]


def test_init_optimizer_takes_muons_state(fit: Command, command: Command) -> None:
    """From a run and from a converted file; the book's format cannot hold it, and says nothing of AdamW."""
    fit(MUON, "--run=one", "--trainer.max_steps=3")
    command("convert", "checkpoints/one", "one.ckpt", "--format", "lightning")
    command("convert", "checkpoints/one", "one.pth", "--format", "book")
    assert "optimizer_state_dict" not in torch.load("one.pth", weights_only=True)
    for name, source in (("two", "checkpoints/one"), ("three", "one.ckpt")):
        fit(MUON, f"--run={name}", "--trainer.max_steps=1", f"--init_from={source}",
            "--init_optimizer=true")  # fmt: skip
    states = [
        torch.load(f"checkpoints/{name}/last.ckpt", weights_only=True)["optimizer_states"][0]
        for name in ("two", "three")
    ]
    buffers = [
        [s["momentum_buffer"] for s in state["state"].values() if "momentum_buffer" in s]
        for state in states
    ]
    assert len(buffers[0]) == 8
    assert all(map(torch.equal, *buffers))
    steps = {float(s["step"]) for s in states[0]["state"].values() if "step" in s}
    assert steps == {4.0}


@pytest.mark.parametrize(
    ("first", "second"), [("adamw", "muon"), ("muon", "adamw"), ("muon", SGD), (SGD, "NAdam")]
)
def test_another_optimizer_is_refused(
    fit: Command, command: Command, first: str, second: str
) -> None:
    fit(f"--model.optimizer={first}", "--trainer.max_steps=2")
    before = Path("checkpoints/quickstart/last.ckpt").read_bytes()
    again = ("fit", *SMALL_QUICKSTART, f"--model.optimizer={second}")
    result = command(*again, "--trainer.max_steps=4", "--ckpt_path=last")
    assert_refused(result, "ckpt_path: ", "model.optimizer", "--init_from")
    assert Path("checkpoints/quickstart/last.ckpt").read_bytes() == before
    result = command(*again, "--trainer.max_steps=1", "--run=new",
                     "--init_from=checkpoints/quickstart", "--init_optimizer=true")  # fmt: skip
    assert_refused(result, "init_optimizer: the source was trained with another optimizer")
    assert not Path("checkpoints/new").exists()


def test_other_groups_of_parameters_are_refused(fit: Command, command: Command) -> None:
    fit("--model.decay_matrices_only=true", "--trainer.max_steps=2")
    result = command("fit", *SMALL_QUICKSTART, "--model.decay_matrices_only=false",
                     "--trainer.max_steps=4", "--ckpt_path=last")  # fmt: skip
    assert_refused(result, "decay_matrices_only", "true", "false")


REFUSED = {
    "lbfgs": (["--model.optimizer=torch.optim.LBFGS"], "closure"),
    "sparse": (["--model.optimizer=SparseAdam"], "sparse gradients"),
    "torchs-muon": (["--model.optimizer=torch.optim.Muon"], "model.optimizer muon"),
    "base": (["--model.optimizer=torch.optim.Optimizer"], "subclasses"),
    "unknown": (["--model.optimizer=torch.optim.Adan"], "did you mean"),
    "other-package": (["--model.optimizer=os.system"], "not an optimizer of torch"),
    "not-a-class": (["--model.optimizer=torch.optim.lr_scheduler"], "not an optimizer of torch"),
    "number": (["--model.optimizer=3"], "not an optimizer of torch"),
    "key": (["--model.optimizer={class_path: SGD, args: {}}"], "args is not a key"),
    "lr": (["--model.optimizer={class_path: SGD, init_args: {lr: 1}}"], "set by model.lr"),
    "fused": (["--model.optimizer={class_path: SGD, init_args: {fused: true}}"], "set by fit"),
    "argument": (["--model.optimizer={class_path: SGD, init_args: {momentom: 1}}"], "momentum"),
    "value": (["--model.optimizer={class_path: SGD, init_args: {momentum: -1}}"], "Invalid"),
    "capturable": (
        ["--model.optimizer={class_path: Adam, init_args: {capturable: true}}"],
        "set by fit",
    ),
    "first-step": (
        ["--model.optimizer={class_path: ASGD, init_args: {lambd: abc}}"],
        "torch.optim.ASGD refuses",
    ),
    "second-step": (
        ["--model.optimizer={class_path: SGD, init_args: {momentum: 0.9, dampening: abc}}"],
        "torch.optim.SGD refuses",
    ),
    "unpacked": (
        ["--model.optimizer={class_path: Rprop, init_args: {step_sizes: 3}}"],
        "torch.optim.Rprop refuses",
    ),
    "number-as-name": (
        ["--model.optimizer={class_path: SGD, init_args: {1: 2}}"],
        "init_args.1: is not an argument",
    ),
    "class-path": (["--model.optimizer={class_path: muon}"], "give model.optimizer muon"),
    "no-class-path": (["--model.optimizer={init_args: {momentum: 0.9}}"], "has no class_path"),
    "dotted": (
        ["--model.optimizer.class_path=SGD", "--model.optimizer.init_args.momentum=0.9"],
        "as {class_path: torch.optim.SGD, init_args: {momentum: 0.9}}",
    ),
    "not-arguments": (["--model.optimizer={class_path: SGD, init_args: 3}"], "not a mapping"),
    "no-effect": (["--model.muon_lr=0.1"], "has no effect"),
    "no-effect-2": (["--model.optimizer=SGD", "--model.muon_momentum=0.1"], "has no effect"),
    "lr-0": ([MUON, "--model.lr=0"], "model.lr: 0"),
    "muon-lr": ([MUON, "--model.muon_lr=0"], "muon_lr"),
    "momentum": ([MUON, "--model.muon_momentum=1"], "muon_momentum"),
    "adjust": ([MUON, "--model.muon_adjust_lr=none"], "original"),
    "original-lr": ([MUON, "--model.muon_adjust_lr=original"], "muon_lr"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_settings_are_refused(command: Command, name: str) -> None:
    arguments, part = REFUSED[name]
    result = command("fit", *SMALL_QUICKSTART, "--trainer.max_steps=1", *arguments)
    assert_refused(result, "model.", part)
    assert not Path("checkpoints").exists()
