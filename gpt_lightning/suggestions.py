"""Suggestions for a mistyped word: the nearest choice, setting or configuration file."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from itertools import islice
from pathlib import Path

# names in other projects → our settings; the first one that the command has is suggested
_SETTINGS = {
    "epochs num_epochs n_epochs num_train_epochs": ("trainer.max_epochs",),
    "steps num_steps max_iters iters total_steps": ("trainer.max_steps", "steps"),
    "learning_rate peak_lr max_lr": ("model.lr",),
    "start_lr warmup_lr initial_learning_rate": ("model.initial_lr",),
    "final_lr end_lr lr_min": ("model.min_lr",),
    "wd": ("model.weight_decay",),
    "warmup num_warmup_steps warmup_iters": ("model.warmup_steps",),
    "batch bs micro_batch_size per_device_train_batch_size": ("data.batch_size", "batch_size"),
    "grad_accum gradient_accumulation_steps accumulate": ("trainer.accumulate_grad_batches",),
    "clip grad_clip max_grad_norm": ("trainer.gradient_clip_val",),
    "gpus num_gpus n_gpus num_devices": ("trainer.devices",),
    "nodes": ("trainer.num_nodes",),
    "device": ("trainer.accelerator",),
    "fp16 bf16 amp mixed_precision dtype": ("trainer.precision", "dtype"),
    "seed": ("seed_everything",),
    "name run_name run_id experiment": ("run",),
    "output_dir out_dir save_dir log_dir logdir": ("trainer.default_root_dir", "out"),
    "output output_path o": ("out",),
    "resume resume_from resume_from_checkpoint": ("ckpt_path",),
    "checkpoint ckpt checkpoint_path": ("from", "ckpt_path"),
    "model model_path model_name weights pretrained": ("from", "init_from"),
    "dataset data_path data_dir train_file corpus": ("data.text", "text"),
    "n_embd d_model hidden_size embed_dim": ("model.config.emb_dim",),
    "n_layer num_layers num_hidden_layers": ("model.config.n_layers",),
    "n_head num_heads num_attention_heads": ("model.config.n_heads", "n_heads"),
    "block_size seq_len max_seq_len sequence_length": ("model.config.context_length",),
    "dropout": ("model.config.drop_rate",),
    "eval_interval eval_steps val_interval": ("evaluation.eval_freq",),
    "save_steps save_interval save_every": ("checkpoint.every_n_train_steps",),
    "temp": ("temperature", "temperatures"),
    "length max_length max_tokens n_tokens": ("max_new_tokens",),
    "n samples num_return_sequences": ("num_samples",),
    "to": ("format",),
    "ftype quantize quantization gguf_type": ("outtype",),
    "threads num_workers jobs": ("workers",),
}
# names in other projects → our values, and commands
_VALUES = {
    "fp16 half float16 amp": ("16-mixed", "float16", "f16"),
    "bf16 bfloat16": ("bf16-mixed", "bfloat16", "bf16"),
    "fp32 float32 float single full": ("32-true", "float32", "f32"),
    "fp64 float64 double": ("64-true",),
    "q8 int8 8bit q8_0": ("q8_0", "int8"),
    "q4 int4 4bit q4_0": ("int4",),
    "huggingface transformers safetensors": ("hf",),
    "hf huggingface": ("hub",),
    "tf tensorflow": ("openai-tf", "openai"),
    "pth pt": ("book",),
    "ckpt": ("lightning",),
    "ggml llama.cpp llamacpp ollama": ("gguf",),
    "ignore continue": ("skip",),
    "nvidia": ("gpu",),
    # commands
    "train pretrain finetune": ("fit",),
    "eval evaluate test": ("validate",),
    "sample infer predict chat complete": ("generate",),
    "export": ("convert",),
    "tokenize preprocess": ("prepare",),
    "fetch": ("download",),
    "estimate": ("plan",),
}


def suggest(word: str, known: Iterable[str]) -> str:
    """A remedy that names the nearest of ``known``, or all of them."""
    known = list(known)
    if near := nearest(word, known):
        return f"did you mean {near}?"
    return f"give one of {', '.join(known)}"


def nearest(word: str, known: Collection[str]) -> str | None:
    """The entry of ``known`` that is nearest to ``word`` (upper and lower case are equal), or None."""
    if synonym := _by_other_name(word, _VALUES, known):
        return synonym
    lower = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), lower, n=1, cutoff=0.5)
    return lower[near[0]] if near else None


def nearest_setting(key: str, settings: Collection[str]) -> str | None:
    """The setting nearest to ``key``: by its name in other projects, by its last part, by its full name."""
    name = _last_part(key).replace("-", "_").lower()
    if synonym := _by_other_name(name, _SETTINGS, settings):
        return synonym
    names = {_last_part(setting) for setting in settings}
    near = [name] if name in names else []
    near = near or sorted(other for other in names if len(name) > 2 and other.startswith(name))
    near = near or get_close_matches(name, names, n=1, cutoff=0.7)
    candidates = [s for s in settings if _last_part(s) in near]
    candidates = candidates or get_close_matches(key, settings, n=1)
    return max(candidates, key=lambda setting: _similarity(key, setting), default=None)


def nearest_config(name: str, max_files: int = 2000) -> str | None:
    """The YAML file whose path is nearest to ``name``.

    It is searched in the folder of ``name``, in the working directory and in the folders there.
    """
    given = Path(name)

    def score(file: str) -> float:
        return max(_similarity(name, file), _similarity(given.stem, Path(file).stem))

    folders = [given.parent, Path(), *(path for path in _visible_entries(Path()) if path.is_dir())]
    files = (
        str(path)
        for folder in folders
        for path in _visible_entries(folder)
        if path.suffix in (".yaml", ".yml", ".json")
    )
    return max(
        (file for file in islice(files, max_files) if score(file) > 0.6),
        key=lambda file: (score(file), _similarity(name, file)),
        default=None,
    )


def _by_other_name(
    word: str, table: Mapping[str, Sequence[str]], known: Collection[str]
) -> str | None:
    """The entry of ``known`` to which ``table`` maps ``word``, or None."""
    mapped = [name for words, names in table.items() if word in words.split() for name in names]
    return next((name for name in mapped if name in known), None)


def _visible_entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _last_part(setting: str) -> str:
    return setting.rpartition(".")[2]


def _similarity(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
