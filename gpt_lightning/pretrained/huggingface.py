"""Reader and writer of Hugging Face's GPT-2 format: ``config.json`` and ``model.safetensors``."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.name_map import HEAD, gpt2_params, hf_name, unwrap_hf_names
from gpt_lightning.pretrained.tokenizer_files import folder_tokenizer, write_tokenizer
from gpt_lightning.pretrained.weights import ModelWeights, same_values

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
_RATES = {"drop_rate": "resid_pdrop", "attn_drop_rate": "attn_pdrop", "emb_drop_rate": "embd_pdrop"}
# other names that transformers accepts for the same settings
_ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
# settings that change what GPT2LMHeadModel computes, with the values for which GPTModel computes the same.
# reorder_and_upcast_attn is not here: it only changes the rounding in half precision.
_REQUIRED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, in files of old versions


def is_huggingface(folder: Path) -> bool:
    """Whether the folder has the files of the format."""
    return (folder / "config.json").is_file() and any(
        (folder / name).is_file() for name in (WEIGHTS, INDEX)
    )


def read_huggingface(folder: Path) -> ModelWeights:
    """Read a folder. The tensors are memory-mapped, the matrices are transposed views.

    Raises:
        ValueError: A file is damaged, or :class:`GPTModel` cannot compute what the model computes.
        OSError: A file is missing or cannot be read.
    """
    settings = read_json(folder / "config.json")
    config = _config(settings, folder / "config.json")
    files = _file_of_each_tensor(folder)
    names = unwrap_hf_names(files, folder)

    def read(name: str) -> Tensor:
        return read_tensor(files[names[name]], names[name])

    if (
        config.tied_embeddings and HEAD in names
    ):  # the file may hold the shared matrix under either name
        names.setdefault("wte.weight", names[HEAD])
    state_dict = {}
    for param in gpt2_params(config.n_layers):
        theirs = hf_name(param)
        if theirs not in names:
            prefix = names.get("wpe.weight", "").removesuffix("wpe.weight")
            raise ValueError(
                f"{folder}: has no {prefix}{theirs}, which its config.json needs; give an intact copy"
            )
        tensor = read(theirs)
        state_dict[param.ours] = tensor.t() if param.kind == "matrix" else tensor
    unknown = [
        names[name]
        for name in names.keys() - {HEAD, *map(hf_name, gpt2_params(config.n_layers))}
        if not name.endswith(_MASKS)
    ]
    if unknown:
        raise ValueError(
            f"{folder}: has {min(unknown)}, which a GPT-2 of its config.json does not have; give another"
        )
    warnings: tuple[str, ...] = ()
    if HEAD in names:
        head = read(HEAD)
        # transformers keeps the head's weights too
        if config.tied_embeddings and not same_values(head, state_dict["tok_emb.weight"]):
            config = replace(config, tied_embeddings=False)
            warnings = (
                f"{folder}: its config.json ties the output head to the token embedding, but {names[HEAD]} has "
                "other weights; keeping them",
            )
        if not config.tied_embeddings:
            state_dict["out_head.weight"] = head
    elif not config.tied_embeddings:
        raise ValueError(
            f"{folder}: has no lm_head.weight, which its config.json needs; give an intact copy"
        )
    tokenizer, other_tokenizer = folder_tokenizer(folder, config.vocab_size)
    return ModelWeights(
        config, state_dict, warnings=warnings, tokenizer=tokenizer, other_tokenizer=other_tokenizer
    )


def write_huggingface(weights: ModelWeights, folder: Path) -> None:
    """Write into an existing folder what ``GPT2LMHeadModel.from_pretrained`` and ``AutoTokenizer`` load."""
    config, state_dict = weights.config, weights.state_dict
    tensors: dict[str, Tensor] = {}
    for param in gpt2_params(config.n_layers):
        if param.ours in state_dict:
            tensor = state_dict[param.ours]
        else:  # without qkv_bias
            tensor = torch.zeros(3 * config.emb_dim, dtype=state_dict["tok_emb.weight"].dtype)
        tensor = tensor.t() if param.kind == "matrix" else tensor
        tensors[f"transformer.{hf_name(param)}"] = tensor.contiguous()
    if not config.tied_embeddings:
        tensors["lm_head.weight"] = state_dict["out_head.weight"].contiguous()
    tokenizer = weights.tokenizer
    fits = config.vocab_size >= tokenizer.vocab_size  # otherwise its tokens are not the tokenizer's
    end_of_text = tokenizer.end_of_text_id if fits else None
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        **{theirs: getattr(config, ours) for ours, theirs in _KEYS.items()},
        **{key: values[0] for key, values in _REQUIRED.items()},
        "resid_pdrop": config.drop_rate,
        "embd_pdrop": config.embedding_drop_rate,
        "attn_pdrop": config.attention_drop_rate,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text),
        "n_ctx": config.context_length,
        "n_inner": None,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": str(state_dict["tok_emb.weight"].dtype).removeprefix("torch."),
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "config.json", settings)
    if fits:
        write_tokenizer(tokenizer, folder)


def read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor with its own memory mapping, whose pages are freed with the tensor."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def tensor_names(path: Path) -> Iterator[str]:
    """The tensor names in a ``.safetensors`` file; ``ValueError`` if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield from file.keys()
    except SafetensorError as error:
        raise ValueError(
            f"{path}: is not a safetensors file, or is damaged ({error}); give an intact copy"
        ) from error


def _file_of_each_tensor(folder: Path) -> dict[str, Path]:
    """Map each tensor's name to the file that holds it."""
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(tensor_names(folder / WEIGHTS), folder / WEIGHTS)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{folder / INDEX}: has no weight_map; give an intact copy")
    files: dict[str, Path] = {}
    for shard in sorted({str(value) for value in weight_map.values()}):
        if Path(shard).name != shard:
            raise ValueError(
                f"{folder / INDEX}: names {shard}, which is not in its folder; give an intact copy"
            )
        files.update(dict.fromkeys(tensor_names(folder / shard), folder / shard))
    shards = {file.name for file in files.values()}
    for unlisted in sorted({path.name for path in folder.glob("model-*.safetensors")} - shards):
        # a shard of the same number of shards is missing in the index; others are left over from another save
        if unlisted.partition("-of-")[2] in {shard.partition("-of-")[2] for shard in shards}:
            raise ValueError(f"{folder / INDEX}: does not name {unlisted}; give an intact copy")
    for name, shard in weight_map.items():
        if files.get(name) != folder / str(shard):
            raise ValueError(f"{folder / INDEX}: {name} is not in {shard}; give an intact copy")
    return files


def _config(settings: dict[str, Any], path: Path) -> GPTConfig:
    for key, allowed in _REQUIRED.items():
        if (value := settings.get(key, allowed[0])) not in allowed:
            raise ValueError(
                f"{path}: {key} is {value!r}; a GPTModel has {allowed[0]!r}; give another model"
            )
    if settings.get("quantization_config") is not None:
        raise ValueError(f"{path}: has a quantization_config; give weights without quantization")
    sizes = {}
    for ours, theirs in _KEYS.items():
        value = _read_size(settings, theirs, path)
        if type(value) is not int:
            raise ValueError(
                f"{path}: {theirs} is {value!r}, not a whole number; give an intact copy"
            )
        sizes[ours] = value
    if settings.get("n_inner") not in (None, 4 * sizes["emb_dim"]):
        raise ValueError(
            f"{path}: n_inner is {settings['n_inner']}; a GPTModel has 4 times n_embd; give another model"
        )
    tied = settings.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise ValueError(
            f"{path}: tie_word_embeddings is {tied!r}, not true or false; give an intact copy"
        )
    rates: dict[str, Any] = {}
    for ours, theirs in _RATES.items():
        rate = settings.get(theirs, 0.1)
        if type(rate) not in (int, float):
            raise ValueError(f"{path}: {theirs} is {rate!r}, not a number; give an intact copy")
        if ours == "drop_rate" or rate != rates["drop_rate"]:
            rates[ours] = rate
    try:
        return GPTConfig(**sizes, **rates, qkv_bias=True, tied_embeddings=tied)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_size(settings: dict[str, Any], key: str, path: Path) -> Any:
    """A setting under either of its names; ``ValueError`` if the two have different values."""
    alias = _ALIASES.get(key, key)
    value = settings.get(key, settings.get(alias))
    if settings.get(alias, value) != value:
        raise ValueError(
            f"{path}: {key} is {value!r} and {alias} is {settings[alias]!r}; remove the wrong one"
        )
    return settings.get("n_ctx") if value is None and key == "n_positions" else value


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that is one JSON object; ``ValueError`` if it is not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); give an intact copy") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a JSON object; give an intact copy")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")
