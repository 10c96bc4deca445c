"""The decoding step in C: its logits are those of the model, and without a compiler torch decodes."""

import copy
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_lightning import GPTConfig, GPTModel, save_model
from gpt_lightning.generation import engine
from gpt_lightning.generation.engine import fastest_backend, stream_ids
from gpt_lightning.generation.sampling import SamplingParams
from gpt_lightning.kernels import c_compiler
from gpt_lightning.kernels import cpu_decode as kernel
from gpt_lightning.kernels.c_compiler import compiler_unsupported_reason
from gpt_lightning.model import cpu_decode
from gpt_lightning.model.cpu_decode import (
    CpuDecodeStep,
    cpu_decode_unsupported_reason,
    reads_prompts_faster,
)
from gpt_lightning.model.decoding_layout import prepare_for_decoding
from gpt_lightning.model.int4_linear import Int4Linear, round_to_int4
from gpt_lightning.model.int8_linear import Int8Linear, has_int8_kernel
from gpt_lightning.model.kv_cache import KVCache
from gpt_lightning.model.packed_linear import pack_weights
from gpt_lightning.model.quantize import INT4, quantize_weights
from helpers import Command, assert_refused, json_of, make_generator, python

REASON = compiler_unsupported_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no C code: {REASON}")
needs_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU has no AVX-512"
)
needs_int8 = pytest.mark.skipif(not has_int8_kernel(), reason="no int8 kernel for this CPU")


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small models are decoded in C, too."""
    monkeypatch.setattr(cpu_decode, "MIN_WEIGHTS", 0)
    kernel.find_library.cache_clear()
    yield
    kernel.find_library.cache_clear()


def model_of(
    emb_dim: int = 128, n_heads: int = 4, *, tied: bool = True, dtype: torch.dtype = torch.float32
) -> GPTModel:
    """Model whose norms and biases differ from their initial values, frozen."""
    torch.manual_seed(1)
    model = GPTModel(
        GPTConfig(vocab_size=211, context_length=40, emb_dim=emb_dim, n_heads=n_heads, n_layers=3,
                  qkv_bias=tied, tied_embeddings=tied)
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval().requires_grad_(False)


@torch.inference_mode()
def logits_of_steps(model: GPTModel, lengths: Sequence[int] = (3,), *, in_c: bool) -> Tensor:
    """Logits ``(steps, R, V)`` after each of the tokens that follow prompts, up to the last position."""
    rows, width = len(lengths), max(lengths)
    ids = torch.randint(211, (rows, 40), generator=make_generator(7))
    padding = torch.tensor([width - length for length in lengths]) if len(set(lengths)) > 1 else None  # fmt: skip
    cache = KVCache.allocate(model.config, rows, 40, dtype=model.tok_emb.weight.dtype)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)  # uninitialized memory may contain NaN
    model.features(ids[:, :width], cache, padding)
    step = CpuDecodeStep(model, cache, padding) if in_c else None
    steps = []
    for at in range(width, 40):
        if step is not None:
            steps.append(step(ids[:, at]).clone())
            assert torch.equal(step.max_logits, steps[-1].amax(dim=-1))
            assert torch.equal(step.argmax_ids, steps[-1].argmax(dim=-1))
        else:
            steps.append(model.head(model.features(ids[:, at : at + 1], cache, padding)[:, -1]))
        assert cache.length == at + 1
    return torch.stack(steps).float()


@torch.inference_mode()
def logits_after_prompt(
    model: GPTModel, lengths: Sequence[int], *, in_c: bool = True, filled: KVCache | None = None
) -> Tensor:
    """Logits ``(R, V)`` after prompts of random tokens, which fill the cache."""
    rows, width = len(lengths), max(lengths)
    ids = torch.randint(211, (rows, width), generator=make_generator(7))
    padding = torch.tensor([width - length for length in lengths])
    cache = filled or KVCache.allocate(model.config, rows, 40, dtype=model.tok_emb.weight.dtype)
    if not in_c:
        return model.head(model.features(ids, cache, padding)[:, -1]).float()
    step = CpuDecodeStep(model, cache)
    logits = step.read(ids, padding)
    assert cache.length == width
    assert torch.equal(step.max_logits, logits.amax(dim=-1))
    assert torch.equal(step.argmax_ids, logits.argmax(dim=-1))
    return logits


SHAPES = [(128, 4), (48, 3), (200, 5), (36, 1), (7, 7)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("emb_dim", "n_heads"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_models(emb_dim: int, n_heads: int, tied: bool, dtype: torch.dtype) -> None:
    """In bfloat16 they are closer to those of the same weights in float32 than torch's are."""
    model = model_of(emb_dim, n_heads, tied=tied, dtype=dtype)
    found, by_torch = (logits_of_steps(model, in_c=in_c) for in_c in (True, False))
    exact = logits_of_steps(copy.deepcopy(model).double(), in_c=False)
    if dtype == torch.float32:
        torch.testing.assert_close(found, exact, atol=2e-5, rtol=2e-5)
    else:
        assert (found - exact).norm() < 0.7 * (by_torch - exact).norm()
        assert (found - exact).norm() < 0.01 * exact.norm()


def dequantized(model: GPTModel, dtype: torch.dtype) -> GPTModel:
    """The model with the weights that its quantized form stands for, in float64."""
    exact, rounded = copy.deepcopy(model), copy.deepcopy(model)
    quantize_weights(rounded, dtype, keep_codes=True)
    for name, layer in rounded.named_modules():
        if not isinstance(layer, Int8Linear | Int4Linear):
            continue
        N, K = layer.shape
        assert layer.codes is not None
        if isinstance(layer, Int8Linear):
            weight = (layer.codes[:, :K].double() - 128) * layer.scales[:, None]
        else:
            pairs = layer.codes.view(N, -1, 64)
            codes = torch.stack((pairs & 15, pairs >> 4), dim=2).view(N, -1, 64).double()
            slopes, offsets = layer.lines.double().unbind(dim=1)
            weight = ((codes - 8) * slopes[..., None] + offsets[..., None]).view(N, -1)[:, :K]
        linear = nn.Linear(K, N, bias=layer.bias is not None, dtype=torch.float64)
        linear.weight.data = weight
        if layer.bias is not None:
            linear.bias.data = layer.bias.double()
        parent, _, child = name.rpartition(".")
        setattr(exact.get_submodule(parent), child, linear)
    for name, norm in rounded.named_modules():
        if isinstance(norm, nn.LayerNorm):
            parent, _, child = name.rpartition(".")
            setattr(exact.get_submodule(parent), child, norm)
    return exact.double().requires_grad_(False)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.int8, INT4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lengths", [(3,), (1, 5, 2)])
@pytest.mark.parametrize(("emb_dim", "n_heads"), SHAPES)
def test_quantized_logits_are_close_to_those_of_the_same_weights(
    emb_dim: int, n_heads: int, lengths: tuple[int, ...], tied: bool, dtype: torch.dtype
) -> None:
    """The reference is the weights that the codes stand for, in float64; what is left is the rounding of vectors."""
    model = model_of(emb_dim, n_heads, tied=tied)
    exact = logits_of_steps(dequantized(model, dtype), lengths, in_c=False)
    quantize_weights(model, dtype, keep_codes=True)
    found = logits_of_steps(model, lengths, in_c=True)
    assert (found - exact).norm() < 0.025 * exact.norm()  # torch's int8: 0.021


@needs_int8
@pytest.mark.parametrize("tokens_at_once", [1, 3, 7, 64])
@pytest.mark.parametrize("lengths", [(40,), (1,), (9, 31, 17, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, INT4])
def test_prompts_are_read_as_the_model_reads_them(
    dtype: torch.dtype, lengths: tuple[int, ...], tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Also the cache: the tokens that follow have the same logits."""
    monkeypatch.setattr(cpu_decode, "_PROMPT_TOKENS", tokens_at_once)
    is_float = dtype.is_floating_point
    model = model_of(200, 5, dtype=dtype if is_float else torch.float32)
    exact = copy.deepcopy(model).double() if is_float else dequantized(model, dtype)
    if not is_float:
        quantize_weights(model, dtype, keep_codes=True)
    caches = [
        KVCache.allocate(model.config, len(lengths), 40, dtype=each.tok_emb.weight.dtype)
        for each in (model, exact)
    ]
    found = logits_after_prompt(model, lengths, filled=caches[0])
    expected = logits_after_prompt(exact, lengths, in_c=False, filled=caches[1])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.01}.get(dtype, 0.025)
    assert (found - expected).norm() < tolerance * expected.norm()
    for mine, theirs in zip(
        (*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values), strict=True
    ):
        for row, length in enumerate(lengths):
            columns = slice(max(lengths) - length, max(lengths))
            difference = mine[row, :, columns].double() - theirs[row, :, columns]
            assert difference.norm() < 2 * tolerance * theirs[row, :, columns].norm()


@needs_int8
def test_codes_are_the_weights_that_torch_multiplies() -> None:
    weight = torch.randn(32, 200, generator=make_generator(3))
    eye = torch.eye(200)
    int8, int4 = Int8Linear(weight, None, keep_codes=True), Int4Linear(weight, None, keep_codes=True)  # fmt: skip
    assert int8.codes is not None
    codes = (int8.codes[:, :200].float() - 128) * int8.scales[:, None]
    torch.testing.assert_close(int8(eye).T, codes, atol=0.02, rtol=0)  # torch's activations: 8 bits
    assert (int8.codes[:, 200:] == 128).all()
    rounded, scales, offsets = round_to_int4(F.pad(weight, (0, 56)))
    expected = ((rounded - 8) * scales + offsets).view(32, -1)[:, :200]
    assert int4.codes is not None
    pairs = int4.codes.view(32, -1, 64)
    codes4 = torch.stack((pairs & 15, pairs >> 4), dim=2).view(32, -1, 64)
    slopes, offsets4 = int4.lines.float().unbind(dim=1)
    found = ((codes4.float() - 8) * slopes[..., None] + offsets4[..., None]).view(32, -1)
    assert torch.equal(found[:, :200], expected)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, INT4])
def test_number_of_threads_does_not_change_a_bit(dtype: torch.dtype) -> None:
    model = model_of(dtype=dtype if dtype.is_floating_point else torch.float32)
    if not dtype.is_floating_point:
        quantize_weights(model, dtype, keep_codes=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            steps = logits_of_steps(model, (1, 1, 1), in_c=True)
            results.append(
                torch.cat((steps.flatten(), logits_after_prompt(model, (33, 40)).flatten()))
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, INT4])
@pytest.mark.parametrize("tokens_at_once", [5, 64])
def test_room_is_enough_for_many_threads(
    dtype: torch.dtype, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread has its own copy of the inputs of a few rows, and there may be more of these than of many rows."""
    rooms = []

    def new_room(step: CpuDecodeStep, rows: int) -> Tensor:
        size = step._decode_room(step._model, rows, step._threads)
        rooms.append((room := torch.full((size + 10_000,), 7.0), size))
        return room[:size]

    monkeypatch.setattr(CpuDecodeStep, "_new_room", new_room)
    monkeypatch.setattr(cpu_decode, "_PROMPT_TOKENS", tokens_at_once)
    model = model_of()
    if dtype == INT4:
        quantize_weights(model, INT4, keep_codes=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(24)
        logits_after_prompt(model, (9, 31, 17, 4))
    finally:
        torch.set_num_threads(before)
    assert all((room[size:] == 7.0).all() for room, size in rooms)


def tokens(model: GPTModel, count: int, **settings: object) -> list[list[int]]:
    prompts = settings.pop("prompts", [[3, 1, 4]])
    sampling = settings.pop("sampling", SamplingParams())
    steps = list(stream_ids(model, prompts, count, sampling, **settings))  # type: ignore[arg-type]
    return torch.stack(steps, dim=1).tolist()


SETTINGS: dict[str, dict[str, object]] = {
    "greedy": {},
    "drawn": {"sampling": SamplingParams(1.0, top_k=20, repetition_penalty=1.2)},
    "several prompts": {"prompts": [[5], [7, 8, 9, 10, 11], list(range(40, 53))]},
    "samples": {"sampling": SamplingParams(0.8), "num_samples": 4, "eos_id": 17},
    "ended": {
        "sampling": SamplingParams(1.0),
        "num_samples": 2,
        "is_over": lambda row, ids: len(ids) >= 10 * (row + 1),
    },
}


@pytest.mark.parametrize("prompts_in_c", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_the_eager_backend(
    name: str, prompts_in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beyond the context of 40, and when the model's training mode was on."""
    monkeypatch.setattr(engine, "reads_prompts_faster", lambda model: prompts_in_c)
    model, settings = model_of().train(), SETTINGS[name]
    assert fastest_backend(model, 4, 3, 60) == "cpu_kernel"
    found = tokens(model, 60, generator=make_generator(5), **settings)
    assert model.training
    assert found == tokens(model, 60, generator=make_generator(5), backend="eager", **settings)
    assert len({token for row in found for token in row}) > 5


def test_torch_decodes_what_the_code_cannot() -> None:
    model = model_of()
    assert fastest_backend(model, 5, 3, 60) == "eager"
    model.tok_emb.weight.requires_grad_(True)
    assert cpu_decode_unsupported_reason(model, 1) == "its weights require gradients"
    model.requires_grad_(False)
    handle = model.trf_blocks[0].register_forward_hook(lambda *_: None)
    assert cpu_decode_unsupported_reason(model, 1) == "it has hooks"
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_decode_unsupported_reason(model, 1) == "autocast is on"
    assert cpu_decode_unsupported_reason(model.half(), 1) is not None
    assert cpu_decode_unsupported_reason(model.float(), 1) is None
    refusal = r"backend: cpu_kernel cannot be used \(5 rows are more than 4\); give eager"
    with pytest.raises(ValueError, match=refusal):
        tokens(model, 3, num_samples=5, backend="cpu_kernel")
    pack_weights(large := model_of(768, 12))
    assert (
        cpu_decode_unsupported_reason(large, 1) == "its linear layers are in a layout for many rows"
    )
    if has_int8_kernel():
        quantize_weights(model, torch.int8)
        assert fastest_backend(model, 1, 3, 60) == "eager"


@needs_int8
def test_prompts_are_read_in_c_where_torch_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not reads_prompts_faster(model_of())
    for has_instructions in (True, False):
        monkeypatch.setattr(cpu_decode, "can_pack", lambda dtype, has=has_instructions: has)
        assert reads_prompts_faster(model_of(dtype=torch.bfloat16)) is not has_instructions
    for dtype in (torch.int8, INT4):
        quantize_weights(model := model_of(), dtype, keep_codes=True)
        assert reads_prompts_faster(model) is (dtype == INT4)


class OtherLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_layers_that_the_code_does_not_know_are_left_to_torch() -> None:
    other = "it has layers of other types than GPTModel"
    for change, reason in (
        (lambda m: setattr(m, "final_norm", nn.LayerNorm(128, bias=False)), other),
        (lambda m: setattr(m.trf_blocks[1], "norm1", nn.RMSNorm(128)), other),
        (lambda m: setattr(m.trf_blocks[1].ff.layers, "1", nn.GELU()), other),
        (lambda m: setattr(m.trf_blocks[1].ff.layers, "2", OtherLinear(512, 128)), "its linear layers"),
        (lambda m: m.pos_emb.bfloat16(), "its embeddings differ in dtype"),
    ):  # fmt: skip
        model = model_of()
        change(model)
        model.requires_grad_(False)
        assert (cpu_decode_unsupported_reason(model, 1) or "").startswith(reason)


@needs_int8
@pytest.mark.parametrize("dtype", [None, torch.int8, INT4])
def test_small_models_need_no_compiler(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None
) -> None:
    """The weights of quantized matrices count, too."""
    monkeypatch.undo()
    assert cpu_decode_unsupported_reason(model_of(), 1) == "it is small"
    with torch.device("meta"):
        model = GPTModel(GPTConfig(vocab_size=65, context_length=8, emb_dim=512, n_heads=8, n_layers=6))  # fmt: skip
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_()
    prepare_for_decoding(model, dtype, rows=1)
    assert cpu_decode_unsupported_reason(model, 1) is None


@needs_int8
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, INT4])
@pytest.mark.parametrize("at", [0, 3, 30])
def test_logits_that_are_not_finite_are_refused(bad: float, dtype: torch.dtype, at: int) -> None:
    model = model_of(dtype=dtype if dtype.is_floating_point else torch.float32)
    if not dtype.is_floating_point:
        quantize_weights(model, dtype, keep_codes=True)
    model.pos_emb.weight[2 + at, 5] = bad
    with pytest.raises(ValueError, match=rf"logits: .*\(new token {at}\)"):
        tokens(model, 35)


SOURCE = Path(kernel.__file__).with_suffix(".c")


@needs_int8
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the compiler's flags are those of x86")
@pytest.mark.parametrize("without", [pytest.param("avx512f", marks=needs_avx512), "avx2"])
def test_code_for_other_cpus_computes_the_same(
    without: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = " ".join(c_compiler.find_compiler() or [])
    expected = {}
    for name in ("native", "other"):
        if name == "other":
            monkeypatch.setenv("CC", f"{compiler} -mno-avx512f -mno-{without}")
            monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path))
            kernel.find_library.cache_clear()
        for dtype in (torch.float32, torch.bfloat16, torch.int8, INT4):
            model = model_of(200, 5, dtype=dtype if dtype.is_floating_point else torch.float32)
            if not dtype.is_floating_point:
                quantize_weights(model, dtype, keep_codes=True)
            logits = logits_of_steps(model, in_c=True)
            prompt = logits_after_prompt(model, (40,))
            before, of_prompt = expected.setdefault(dtype, (logits, prompt))
            assert (logits - before)[0].norm() < 1e-5 * before[0].norm()
            # after sums in another order, a key may be rounded to the next bfloat16, and a vector to the next 8 bits
            rounding = 1e-4 if dtype.is_floating_point else 0.03
            assert (logits - before).norm() < rounding * before.norm()
            assert (prompt - of_prompt).norm() < rounding * of_prompt.norm()
    assert len(list((tmp_path / "kernels").glob("cpu_decode-*.so"))) == 1


@pytest.mark.parametrize(
    ("compiler", "cause"),
    [
        ("false", "false failed: no message"),
        ("sh -c 'echo x.c:1: error: no such thing >&2; exit 1'", "sh failed: x.c:1: error: no such thing"),
        ("true", "No such file or directory"),
        ("gcc '", "CC: cannot be read"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("messages")
def test_compiler_that_fails_is_reported_once(
    compiler: str,
    cause: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path))
    for _ in range(2):
        assert cpu_decode_unsupported_reason(model_of(), 1) == "there is no C code for this CPU"
    error = capsys.readouterr().err
    assert error.startswith("gpt_lightning: cpu_decode.c: ")
    assert cause in error
    assert error.endswith("; torch's kernels decode, more slowly\n")
    assert error.count("\n") == 1
    assert list(tmp_path.rglob("*.so")) == []


@pytest.mark.usefixtures("messages")
def test_missing_compiler_is_not_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert cpu_decode_unsupported_reason(model_of(), 1) == "there is no C code for this CPU"
    monkeypatch.setattr(sys, "platform", "win32")
    kernel.find_library.cache_clear()
    assert cpu_decode_unsupported_reason(model_of(), 1) == "there is no C code for this CPU"
    assert capsys.readouterr().err == ""


def test_library_that_others_may_write_is_not_loaded(tmp_path: Path) -> None:
    library = c_compiler.load_library(SOURCE, tmp_path)
    path = Path(library._name)
    path.chmod(0o777)
    with pytest.raises(OSError, match="can be written by other users"):
        c_compiler.load_library(SOURCE, tmp_path)


LOAD = (
    "import sys; from pathlib import Path; from gpt_lightning.kernels.c_compiler import load_library; "
    "print(load_library(*map(Path, sys.argv[1:])).decode_step is not None)"
)


def test_damaged_library_is_compiled_again(tmp_path: Path) -> None:
    """Its rights are the user's, whatever the umask is."""
    before = os.umask(0)
    try:
        assert python("-c", LOAD, str(SOURCE), str(tmp_path)).stdout == "True\n"
        (path,) = tmp_path.iterdir()
        path.write_bytes(b"")
        assert python("-c", LOAD, str(SOURCE), str(tmp_path)).stdout == "True\n"
    finally:
        os.umask(before)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_compiler_of_cpp_compiles_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "g++")
    assert c_compiler.load_library(SOURCE, tmp_path).decode_step is not None


def test_processes_that_compile_at_once(tmp_path: Path) -> None:
    """Each finds a complete library, and one file is left."""
    results: list[subprocess.CompletedProcess[str]] = []
    threads = [threading.Thread(target=lambda: results.append(python("-c", LOAD, str(SOURCE), str(tmp_path)))) for _ in range(3)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.stdout for result in results] == ["True\n"] * 3, results
    assert len(os.listdir(tmp_path)) == 1


@needs_int8
def test_generate_command_decodes_in_c(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to four texts in C, the same as torch's in float32. More texts, or speculation: torch."""
    torch.manual_seed(3)
    config = GPTConfig(vocab_size=50257, context_length=64, emb_dim=64, n_heads=4, n_layers=2)
    save_model(GPTModel(config), "model.ckpt", "lightning")
    steps = []
    call = CpuDecodeStep.__call__
    monkeypatch.setattr(CpuDecodeStep, "__call__", lambda self, ids: (steps.append(1), call(self, ids))[1])  # fmt: skip
    generate = ("generate", "--from=model.ckpt", "--prompt=the", "--json", "--max_new_tokens=9")
    found = json_of(command(*generate))
    assert len(steps) == 8
    for dtype in ("bfloat16", "int8", "int4"):
        steps.clear()
        json_of(command(*generate, f"--dtype={dtype}"))
        assert len(steps) == 8
    steps.clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    kernel.find_library.cache_clear()
    assert json_of(command(*generate))["token_ids"] == found["token_ids"]
    monkeypatch.delenv("CC")
    kernel.find_library.cache_clear()
    json_of(command(*generate, "--num_samples=4"))
    assert len(steps) == 8
    steps.clear()
    for more in ("--num_samples=5", "--speculate=ngram", "--dtype=float16"):
        assert json_of(command(*generate, more))
    assert steps == []
    assert_refused(command(*generate, "--dtype=int5"), "dtype")
