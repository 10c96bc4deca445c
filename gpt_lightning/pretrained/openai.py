"""Reader and writer of OpenAI's GPT-2 format: ``hparams.json`` and a TensorFlow checkpoint.

TensorFlow needs 1.3 GB on disk and 6 s to import, so it runs in a separate process (``openai_tf.py``), which
converts the checkpoint to a safetensors file with OpenAI's names, and back. The safetensors file stays in the
cache under the checkpoint's checksum, with a manifest: each checkpoint is converted once.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

from gpt_lightning.data.tokenizer import VOCAB_SIZE, vocabulary_bytes
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.huggingface import (
    WEIGHTS,
    read_json,
    read_tensor,
    tensor_names,
    write_json,
)
from gpt_lightning.pretrained.name_map import ParamMapping, gpt2_params
from gpt_lightning.pretrained.tokenizer_files import tokenizer_difference
from gpt_lightning.pretrained.weights import ModelWeights
from gpt_lightning.storage.cache import cache_folder
from gpt_lightning.storage.checksum import damaged_files, write_manifest

CHECKPOINT = "model.ckpt"
INDEX, DATA = f"{CHECKPOINT}.index", f"{CHECKPOINT}.data-00000-of-00001"
_KEYS = {
    "vocab_size": "n_vocab",
    "context_length": "n_ctx",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
_SUFFIX = {"embedding": "", "gain": "/g", "matrix": "/w", "bias": "/b"}


def is_openai(folder: Path) -> bool:
    """Whether the folder has the files of the format."""
    return (folder / "hparams.json").is_file() and (folder / INDEX).is_file()


def read_openai(folder: Path) -> ModelWeights:
    """Read a folder. The tensors are memory-mapped, the matrices are transposed views.

    Raises:
        ValueError: A file is damaged, or TensorFlow is not installed.
        OSError: A file is missing or cannot be read.
    """
    config = _config(folder / "hparams.json")
    converted = _as_safetensors(folder)
    unread = set(tensor_names(converted))
    state_dict = {}
    for param in gpt2_params(config.n_layers):
        theirs = _variable_name(param)
        if theirs not in unread:
            raise ValueError(
                f"{folder}: has no variable {theirs}, which its hparams.json needs; give an intact copy"
            )
        tensor = read_tensor(converted, theirs)
        if param.kind == "matrix":  # (1, in, out)
            tensor = tensor[0].t()
        state_dict[param.ours] = tensor
        unread.discard(theirs)
    # an optimizer's scalars are ignored, but a matrix, such as a separate head, belongs to the model
    unknown = [n for n in unread if n.startswith("model/") or read_tensor(converted, n).dim() > 1]
    if unknown:
        raise ValueError(
            f"{folder}: has {min(unknown)}, which a GPT-2 of its hparams.json does not have; give another"
        )
    return ModelWeights(
        config, state_dict, other_tokenizer=tokenizer_difference(folder, config.vocab_size)
    )


def write_openai(weights: ModelWeights, folder: Path) -> None:
    """Write into an existing folder, with OpenAI's vocabulary files beside the weights.

    Raises:
        ValueError: The output head is not the token embedding: the format cannot hold a separate one.
    """
    config, state_dict = weights.config, weights.state_dict
    if not config.tied_embeddings:
        raise ValueError(
            "format: openai-tf cannot hold a separate output head, which this model has; give hf"
        )
    tensors = {}
    for param in gpt2_params(config.n_layers):
        if param.ours in state_dict:
            tensor = state_dict[param.ours].to(torch.float32)
        else:  # without qkv_bias
            tensor = torch.zeros(3 * config.emb_dim)
        tensors[_variable_name(param)] = (
            tensor.t()[None].contiguous() if param.kind == "matrix" else tensor.contiguous()
        )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        file = Path(scratch) / "weights.safetensors"
        save_file(tensors, file)
        _run_tensorflow("write", file, folder / CHECKPOINT)
    (folder / "checkpoint").write_text(
        f'model_checkpoint_path: "{CHECKPOINT}"\nall_model_checkpoint_paths: "{CHECKPOINT}"\n',
        encoding="utf-8",
        newline="\n",
    )
    write_json(
        folder / "hparams.json", {theirs: getattr(config, ours) for ours, theirs in _KEYS.items()}
    )
    if config.vocab_size >= VOCAB_SIZE:  # otherwise its tokens are not GPT-2's
        for vocabulary in ("encoder.json", "vocab.bpe"):
            (folder / vocabulary).write_bytes(vocabulary_bytes(vocabulary))


def _variable_name(param: ParamMapping) -> str:
    """The tensor's name in OpenAI's checkpoint: ``model/h0/attn/c_attn/w``."""
    return f"model/{param.module.replace('h.', 'h').replace('.', '/')}{_SUFFIX[param.kind]}"


def _config(path: Path) -> GPTConfig:
    settings = read_json(path)
    sizes = {ours: settings.get(theirs) for ours, theirs in _KEYS.items()}
    for ours, value in sizes.items():
        if type(value) is not int:
            raise ValueError(
                f"{path}: {_KEYS[ours]} is {value!r}, not a whole number; give an intact copy"
            )
    try:
        return GPTConfig(**sizes, qkv_bias=True, tied_embeddings=True)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _as_safetensors(folder: Path) -> Path:
    key = hashlib.sha256()
    for name in (INDEX, DATA):
        with (folder / name).open("rb") as file:
            key.update(hashlib.file_digest(file, "sha256").digest())
    cached = cache_folder() / "from-tensorflow" / key.hexdigest()
    if not cached.exists() or damaged_files(cached):
        shutil.rmtree(cached, ignore_errors=True)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".") as scratch:
            written = Path(scratch) / cached.name
            written.mkdir()
            _run_tensorflow("read", folder / CHECKPOINT, written / WEIGHTS)
            write_manifest(written, [WEIGHTS])
            with suppress(OSError):  # another process was as far
                written.rename(cached)
            if not cached.exists():
                raise OSError(f"{cached}: cannot be written; free disk space")
    return cached / WEIGHTS


def _run_tensorflow(action: str, source: Path, target: Path) -> None:
    """Run ``openai_tf.py`` with ``read`` or ``write``."""
    if find_spec("tensorflow") is None:
        raise ValueError(
            f"{source}: OpenAI's format needs TensorFlow, which is not installed; "
            "python -m pip install 'gpt-lightning[openai]', or use Hugging Face's format"
        )
    module = f"{__package__}.openai_tf"
    done = subprocess.run(
        [sys.executable, "-m", module, action, str(source), str(target)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # TensorFlow's own messages are in the system's encoding
        check=False,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(
            f"{source}: TensorFlow cannot {action} it: {last[:200]}; give an intact copy, or free disk space"
        )
