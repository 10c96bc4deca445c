"""Generator of the tables of ``docs/performance.md``, from ``benchmarks/results/*.json``.

Usage: ``python docs/generate_performance.py``. It replaces what is between ``<!-- table: NAME -->`` and
``<!-- end -->``. A test fails if a table is not up to date.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGE = DOCS / "performance.md"
RESULTS = DOCS.parent / "benchmarks" / "results"


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def page(text: str) -> str:
    """The page with its tables made again."""

    def replaced(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", replaced, text, flags=re.S)


def training_bf16() -> str:
    rates = result("2-core-amd-epyc-avx512-training.json")["tokens_per_second"]
    rows = [
        ("gpt_lightning, bf16", "ours, bf16"),
        ("gpt_lightning, bf16, compiled blocks", "ours, compiled, bf16"),
        ("gpt_lightning, bf16, loss in chunks", "ours, chunked, bf16"),
        ("transformers, bf16", "transformers, bf16"),
        ("nanoGPT, bf16, compiled", "nanoGPT, compiled, bf16"),
        ("the book, float32", "the book, float32"),
    ]
    return table(
        ["", "2 windows of 256", "4 windows of 1,024"],
        [
            [label, *(rate(rates.get(f"{shape}: {key}")) for shape in ("B2 T256", "B4 T1024"))]
            for label, key in rows
        ],
    )


def training_float32() -> str:
    content = result("2-core-amd-epyc-avx2-training.json")
    rates, memory = content["tokens_per_second"], content["memory_gb"]
    rows = [
        ("gpt_lightning", "ours, float32"),
        ("gpt_lightning, compiled blocks", "ours, compiled, float32"),
        ("gpt_lightning, untied head", "ours, head not tied, float32"),
        ("transformers", "transformers, float32"),
        ("LitGPT, compiled", "LitGPT, compiled, float32"),
        ("the book", "the book, float32"),
    ]
    return table(
        ["", "tokens/s", "peak memory"],
        [
            [label, rate(rates[f"B2 T256: {key}"]), f"{memory[f'B2 T256: {key}']:.2f} GB"]
            for label, key in rows
        ],
    )


def decoding_cpu() -> str:
    avx512 = result("2-core-amd-epyc-avx512-generation.json")["tokens_per_second"]
    avx2 = result("2-core-amd-epyc-avx2-generation.json")["tokens_per_second"]
    rows = [
        ("gpt_lightning", "ours"),
        ("transformers", "transformers"),
        ("CTranslate2", "CTranslate2"),
        ("llama.cpp", None),
        ("the book, no KV cache", "the book"),
        ("gpt_lightning, batch 8", "ours, batch 8"),
        ("CTranslate2, batch 8", "CTranslate2, batch 8"),
    ]
    of_llama = {"float32": "llama.cpp F32", "bfloat16": "llama.cpp BF16"}
    columns = [(avx512, "float32"), (avx512, "bfloat16"), (avx2, "float32")]
    return table(
        ["", "AVX-512, float32", "AVX-512, bfloat16", "AVX2, float32"],
        [
            [
                label,
                *(
                    rate(rates.get(f"{dtype}, {key or of_llama[dtype]}"), 1)
                    for rates, dtype in columns
                ),
            ]
            for label, key in rows
        ],
    )


def gpu_training() -> str:
    results = result("h200-gpu.json")["results"]
    rows = [
        ("the book's model, float32, batch 16", "124M training: eager fp32 (the book's model)"),
        ("`gpt_lightning`'s model, bf16, batch 16", "124M training: SDPA (our model)"),
        ("compiled blocks, fused AdamW", "124M training: compiled blocks"),
        ("loss in chunks, one kernel per chunk", "124M training: one kernel a chunk"),
        ("batch 128", "124M training: batch 128"),
        ("the `fit` command, batch 128", "124M fit"),
    ]
    return table(
        ["124M, windows of 1,024", "tokens/s", "peak memory"],
        [
            [
                label,
                f"{results[key]['tokens_per_second'][0]:,.0f}",
                f"{results[key]['memory_gb']:.1f} GB",
            ]
            for label, key in rows
        ],
    )


def gpu_decoding() -> str:
    results = result("h200-gpu.json")["results"]
    backends = ["plain", "graph", "fused", "transformers"]
    rows = []
    for size in ("124M", "1558M"):
        for batch in (1, 4, 8):
            keys = [f"{size} decoding, batch {batch}: {backend}" for backend in backends]
            rates = [
                results[key]["tokens_per_second"][0] if key in results else None for key in keys
            ]
            rows.append([f"{size}, batch {batch}", *(f"{r:,.0f}" if r else "" for r in rates)])
    return table(["", "eager", "CUDA graph", "fused kernels", "transformers"], rows)


def preparing() -> str:
    runs = result("2-core-amd-epyc-data.json")["runs"]
    return table(
        ["workers", "seconds", "peak memory"],
        [
            [workers, f"{runs[workers]['seconds']:.0f}", f"{runs[workers]['peak_mb']:.0f} MB"]
            for workers in ("1", "2", "4")
        ],
    )


def loading() -> str:
    lines = (RESULTS / "2-core-amd-epyc-loading.jsonl").read_text(encoding="utf-8").splitlines()
    formats = {"hf": "Hugging Face", "lightning": "gpt_lightning", "book": "the book"}
    rows = []
    for line in lines:
        loads = json.loads(line)["loads"]
        size, _, dtype, weights_bytes, *_ = loads[0]
        peaks = {name: peak for _, name, _, _, peak, _ in loads}
        head = f"{size.removeprefix('gpt2-')}, {dtype}, {weights_bytes / 1e9:.2f} GB"
        rows.append([head, *(f"{peaks[name]:.2f}" for name in formats)])
    return table(["", *formats.values()], rows)


def startup() -> str:
    seconds = result("2-core-amd-epyc-avx512-startup.json")["seconds"]
    return table(["", "seconds"], [[f"`{what}`", f"{took:.2f}"] for what, took in seconds.items()])


TABLES = {
    "training-bf16": training_bf16,
    "training-float32": training_float32,
    "decoding-cpu": decoding_cpu,
    "gpu-training": gpu_training,
    "gpu-decoding": gpu_decoding,
    "preparing": preparing,
    "loading": loading,
    "startup": startup,
}


def result(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def rate(values: Sequence[float] | None, digits: int = 0) -> str:
    """Median, and minimum to maximum."""
    if values is None:
        return ""
    median, low, high = values
    return f"{median:,.{digits}f} ({low:,.{digits}f} – {high:,.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines
    )


if __name__ == "__main__":
    main()
