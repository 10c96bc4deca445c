"""llama.cpp's llama-bench as a peer of generation.py, on GGUF files that gpt_lightning writes."""

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from gpt_lightning import GPTConfig, GPTModel, save_model

TYPES = {  # llama.cpp's names, by the dtype of ours in whose round they run
    "float32": ("F32", "F16", "Q8_0", "Q4_0"),
    "bfloat16": ("BF16",),
}


class LlamaBench:
    """A prompt of ``prompt`` tokens and ``new`` tokens after it, in one sequence."""

    def __init__(self, program: Path, model: Path, prompt: int, new: int) -> None:
        self._command = [
            str(program), "--model", str(model), "--threads", str(torch.get_num_threads()), "--n-prompt", "0",
            "--n-gen", "0", "-pg", f"{prompt},{new}", "--repetitions", "1", "--output", "json",
        ]  # fmt: skip

    def go(self) -> float:
        """Run once; the seconds it took, without loading."""
        return float(self._run()["avg_ns"]) / 1e9

    def version(self) -> str:
        return str(self._run()["build_commit"])

    def _run(self) -> dict[str, Any]:
        done = subprocess.run(self._command, capture_output=True, text=True, check=True)
        (result,) = json.loads(done.stdout)
        assert isinstance(result, dict)
        return result


def write_models(config: dict[str, Any], program: Path, folder: Path) -> dict[str, Path]:
    """Files of a random model by type. Q4_0 is missing if llama-quantize does not lie beside llama-bench."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(**config))
    files = {}
    for outtype in ("f32", "f16", "bf16", "q8_0"):
        files[outtype.upper()] = folder / f"{outtype}.gguf"
        save_model(model, files[outtype.upper()], "gguf", outtype=outtype)
    quantize = program.with_name("llama-quantize")
    if not quantize.exists():
        print(f"Q4_0 is not measured: {quantize} does not exist")
        return files
    files["Q4_0"] = folder / "q4_0.gguf"
    command = [str(quantize), str(files["F32"]), str(files["Q4_0"]), "q4_0"]
    subprocess.run(command, capture_output=True, check=True)
    return files
