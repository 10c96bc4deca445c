"""One backend of training or decoding in a separate process, with the interpreter in which a peer is installed.

training.py and generation.py start it (worker.py). For each line on standard input it runs the backend once and prints the
seconds; for the line "memory" it prints the peak memory of the process.

Usage: python peers.py train BACKEND SETTINGS    (SETTINGS: JSON with config, batch, length, precision)
       python peers.py decode BACKEND SETTINGS   (SETTINGS: JSON with config, batch, prompt, new, dtype)
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

if sys.argv[1:3] == ["decode", "ours"]:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of inputs and targets (B, T)


def ours(settings: dict[str, Any]) -> tuple[torch.nn.Module, Loss]:
    from gpt_lightning import GPTConfig, GPTModel
    from gpt_lightning.model.loss import chunked_cross_entropy, cross_entropy

    model = GPTModel(GPTConfig(**settings["config"]))
    if settings.get("compile"):
        for block in model.trf_blocks:
            block.compile()
    chunk = settings.get("chunk")

    def loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if chunk is None:
            return cross_entropy(model(inputs), targets)
        return chunked_cross_entropy(model.features(inputs), model.head_weight, targets, chunk)

    return model, loss


def loss_of_logits(logits: Callable[[torch.Tensor], torch.Tensor]) -> Loss:
    return lambda inputs, targets: F.cross_entropy(logits(inputs).flatten(0, 1), targets.flatten())


def transformers(settings: dict[str, Any]) -> tuple[torch.nn.Module, Loss]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = settings["config"]
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config["vocab_size"], n_positions=config["context_length"], n_embd=config["emb_dim"],
            n_head=config["n_heads"], n_layer=config["n_layers"], attn_pdrop=0.0, embd_pdrop=0.0,
            resid_pdrop=0.0, use_cache=False, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    return model, loss_of_logits(lambda inputs: model(inputs).logits)


def litgpt(settings: dict[str, Any]) -> tuple[torch.nn.Module, Loss]:
    """Pythia's architecture in the same shape: LitGPT has no GPT-2. Its head is not tied."""
    from litgpt.config import Config
    from litgpt.model import GPT

    config = settings["config"]
    model = GPT(
        Config.from_name(
            "pythia-160m", n_layer=config["n_layers"], n_embd=config["emb_dim"], n_head=config["n_heads"],
            padded_vocab_size=config["vocab_size"], block_size=config["context_length"],
        )
    )  # fmt: skip
    return model, loss_of_logits(model)


def nanogpt(settings: dict[str, Any]) -> tuple[torch.nn.Module, Loss]:
    """The model of a checkout of nanoGPT, which computes its loss itself."""
    sys.path.insert(0, settings["folder"])
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    config = settings["config"]
    with redirect_stdout(sys.stderr):  # it prints its size
        model = GPT(
            GPTConfig(
                block_size=config["context_length"], vocab_size=config["vocab_size"], n_layer=config["n_layers"],
                n_head=config["n_heads"], n_embd=config["emb_dim"], dropout=0.0, bias=True,
            )
        )  # fmt: skip
    model.compile()  # as its train.py does
    return model, lambda inputs, targets: model(inputs, targets.contiguous())[1]


def book(settings: dict[str, Any]) -> tuple[torch.nn.Module, Loss]:
    """The book's model, as in tests/book.py; its head is not tied."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from book import BookGPT

    model = BookGPT(settings["config"])
    return model, loss_of_logits(model)


MODELS = {
    "ours": ours,
    "transformers": transformers,
    "litgpt": litgpt,
    "nanogpt": nanogpt,
    "book": book,
}


def train_step(backend: str, settings: dict[str, Any]) -> Callable[[], None]:
    torch.manual_seed(0)
    if backend == "ours":
        from gpt_lightning.training.hardware import keep_freed_memory

        keep_freed_memory()  # as fit does
    model, loss = MODELS[backend](settings)
    if backend == "litgpt":
        model.compile()  # as its pretrain command does
    model.train()
    # the book's loop has torch's default AdamW, the others the fused one
    fused = None if backend == "book" else True
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused
    )
    generator = torch.Generator().manual_seed(0)
    shape = (settings["batch"], settings["length"] + 1)
    ids = torch.randint(settings["config"]["vocab_size"], shape, generator=generator)
    bf16 = settings["precision"] == "bf16"

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            value = loss(ids[:, :-1], ids[:, 1:])
        value.backward()
        optimizer.step()

    return step


def decode(backend: str, settings: dict[str, Any]) -> Callable[[], object]:
    """Greedy decoding of ``new`` tokens after prompts of ``prompt`` tokens. "plain" is a loop over our model and cache, "memory" one that reads memory."""
    torch.manual_seed(0)
    if backend == "ctranslate2":
        return ctranslate2_decoding(settings)
    if backend == "memory":
        return memory_reading(settings)
    model, _ = MODELS["ours" if backend == "plain" else backend](settings)
    is_quantized = settings["dtype"] in ("int8", "int4")
    model = model.to(torch.float32 if is_quantized else getattr(torch, settings["dtype"])).eval()
    length, new, config = settings["prompt"], settings["new"], settings["config"]
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(config["vocab_size"], (settings["batch"], length), generator=generator)
    if backend == "transformers":
        return lambda: model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, use_cache=True, pad_token_id=0,
        )  # fmt: skip
    if backend == "litgpt":
        from litgpt.generate.base import generate

        model.max_seq_length = length + new  # as its own command does
        model.set_kv_cache(batch_size=1)
        return lambda: generate(model, prompt[0], length + new, temperature=0.0)
    if backend == "book":
        from book import generate

        return lambda: generate(model, prompt, new, config["context_length"])
    if backend == "plain":
        return lambda: _plain_decoding(model, prompt, new)
    from gpt_lightning.generation.engine import stream_ids
    from gpt_lightning.generation.sampling import SamplingParams
    from gpt_lightning.model.decoding_layout import prepare_for_decoding

    # as the generate command does
    prepare_for_decoding(model, getattr(torch, settings["dtype"]), rows=settings["batch"])
    return lambda: list(stream_ids(model, prompt.tolist(), new, SamplingParams()))


def memory_reading(settings: dict[str, Any]) -> Callable[[], Any]:
    """Read as many bytes as the weights have, once for each new token: the fastest that decoding can be."""
    config = settings["config"]
    weights = (12 * config["n_layers"] * config["emb_dim"] + config["vocab_size"]) * config["emb_dim"]  # fmt: skip
    numbers = torch.ones(weights * getattr(torch, settings["dtype"]).itemsize // 4)
    return lambda: [numbers.sum() for _ in range(settings["new"])]


def ctranslate2_decoding(settings: dict[str, Any]) -> Callable[[], Any]:
    """CTranslate2's generator, on the Hugging Face form of a random model; "int8" quantizes the weights."""
    import tempfile

    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    from transformers import GPT2TokenizerFast

    batch, length, new = settings["batch"], settings["prompt"], settings["new"]
    with tempfile.TemporaryDirectory() as folder:
        model, _ = transformers(settings)
        model.generation_config.bos_token_id = model.config.bos_token_id = 0
        model.generation_config.eos_token_id = model.config.eos_token_id = 0
        model.save_pretrained(f"{folder}/hf")
        # the converter wants a vocabulary; the prompts are tokens of it
        tokens = {f"t{i}": i for i in range(settings["config"]["vocab_size"])}
        Path(f"{folder}/hf/vocab.json").write_text(json.dumps(tokens))
        Path(f"{folder}/hf/merges.txt").write_text("#version: 0.2\n")
        tokenizer = GPT2TokenizerFast(
            f"{folder}/hf/vocab.json",
            f"{folder}/hf/merges.txt",
            unk_token="t0",
            bos_token="t0",
            eos_token="t0",
        )
        tokenizer.save_pretrained(f"{folder}/hf")
        TransformersConverter(f"{folder}/hf").convert(
            f"{folder}/ct2", quantization=settings["dtype"]
        )
        del model
        generator = ctranslate2.Generator(
            f"{folder}/ct2", compute_type=settings["dtype"], intra_threads=torch.get_num_threads()
        )
    prompt = [[f"t{i + 1}" for i in range(length)]] * batch

    def decode() -> Any:
        results = generator.generate_batch(
            prompt,
            max_length=new,
            min_length=new,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
        )
        assert all(len(result.sequences_ids[0]) == new for result in results)
        return results

    return decode


@torch.inference_mode()
def _plain_decoding(model: torch.nn.Module, ids: torch.Tensor, new: int) -> torch.Tensor:
    from gpt_lightning.model.kv_cache import KVCache

    cache = KVCache.allocate(
        model.config, len(ids), ids.shape[1] + new, dtype=model.tok_emb.weight.dtype
    )
    new_ids = ids
    for _ in range(new):
        new_ids = model(new_ids, cache)[:, -1:].argmax(dim=-1)
        ids = torch.cat((ids, new_ids), dim=1)
    return ids


def peak_memory() -> int:
    """Peak resident memory in bytes. getrusage would include the peak of the parent process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


TASKS = {"train": train_step, "decode": decode}


def main() -> None:
    warnings.filterwarnings("ignore")
    task, backend, settings = sys.argv[1:]
    run = TASKS[task](backend, json.loads(settings))
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(peak_memory(), flush=True)
            continue
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
