"""Texts as Lightning's data: split, tokenized once, cut into windows."""

import math
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from gpt_lightning.data.dataloader import ResumableDataLoader, Rng
from gpt_lightning.data.dataset import ConcatWindowDataset, WindowDataset
from gpt_lightning.data.epochs import (
    EpochShape,
    GlobalBatch,
    batches_of_epoch,
    global_batch,
    window_length,
)
from gpt_lightning.data.same_windows import check_same_windows
from gpt_lightning.data.sampler import MixtureSampler
from gpt_lightning.data.token_cache import find_tokenizer, read_splits
from gpt_lightning.data.token_store import is_store
from gpt_lightning.data.tokenizer import Tokenizer


class TextDataModule(LightningDataModule):
    """Sliding windows over a text, the first part of it for training, the rest for validation.

    With a global batch the windows of each optimizer step are the same on any number of devices, with any
    batch_size and any number of workers, and an epoch ends with its last complete step. Without one a step is
    batch_size windows on each device, times trainer.accumulate_grad_batches; an epoch ends with its last
    complete batch, and its last step may have fewer batches.

    Args:
        text: File, folder, token store, sample or verdict; sample = a story that comes with the package;
            verdict = The Verdict, from the cache or downloaded; a folder has .txt and .md files; prepare writes
            token stores.
        mixture: Several texts instead of one, each with a weight: the share of the training windows that
            come from it. Each text has its own epochs; an epoch of the run has as many windows as all texts
            together. Validation reads all windows of all texts.
        train_ratio: Share of the characters that is for training; it is the start of the text. No effect on a
            token store, which is split already.
        tokenizer: A tokenizer.json of byte-level BPE, or a folder with one, for a text that is not a token store;
            gpt2 = GPT-2's; null = that of the weights or of the token store, else GPT-2's.
        context_length: Tokens in a window; null = the model's context_length.
        stride: Tokens from one window's start to the next; null = the window's length.
        document_mask: Whether attention stays within a document; each begins with <|endoftext|> and has
            positions from 0. Attention's fast kernels cannot be used with it.
        batch_size: Windows per micro-batch on each device.
        global_batch_size: Windows per optimizer step on all devices; the number of accumulated batches
            follows from it.
        global_batch_tokens: The same in tokens.
        num_workers: Threads that read batches ahead; the batches are the same with any number.
        seed: Seed of the order of the windows.
        rng: 'step': the order is a function of seed and epoch. 'global': it is drawn on torch's global
            generator, as in the book.
    """

    def __init__(
        self,
        text: str = "verdict",
        mixture: dict[str, float] | None = None,
        train_ratio: float = 0.9,
        tokenizer: str | None = None,
        context_length: int | None = None,
        stride: int | None = None,
        document_mask: bool = False,
        batch_size: int = 2,
        global_batch_size: int | None = None,
        global_batch_tokens: int | None = None,
        num_workers: int = 0,
        seed: int = 123,
        rng: Rng = "step",
    ) -> None:
        super().__init__()
        for name, value in [
            ("context_length", context_length),
            ("stride", stride),
            ("batch_size", batch_size),
            ("global_batch_size", global_batch_size),
            ("global_batch_tokens", global_batch_tokens),
        ]:
            if value is not None and value < 1:
                raise ValueError(f"data.{name}: {value} is too small; give 1 or more")
        if global_batch_size is not None and global_batch_tokens is not None:
            raise ValueError(
                "data.global_batch_tokens: data.global_batch_size is given too; give one of them"
            )
        if num_workers < 0:
            raise ValueError(f"data.num_workers: {num_workers} is negative; give 0 or more")
        if not 0.0 < train_ratio < 1.0:
            raise ValueError(
                f"data.train_ratio: {train_ratio} leaves a split empty; give a share between 0 and 1"
            )
        if mixture is not None:
            _check_mixture(mixture, rng)
        self.text = text
        self.mixture = mixture
        self.train_ratio = train_ratio
        self.tokenizer_path = tokenizer
        self.context_length = context_length
        self.stride = stride
        self.document_mask = document_mask
        self.batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.global_batch_tokens = global_batch_tokens
        self.num_workers = num_workers
        self.seed = seed
        self.rng: Rng = rng
        self.validates_training = True
        self._tokenizer: Tokenizer | None = None
        self._windows: dict[str, WindowDataset | ConcatWindowDataset] = {}
        self._counts: list[int] = []  # training windows of each text
        self._checked: Trainer | None = None  # whose batches were

    @property
    def texts(self) -> list[str]:
        """What is read: ``text``, or the texts of ``mixture``."""
        return [self.text] if self.mixture is None else list(self.mixture)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all texts; set it to that of a model with weights."""
        if self._tokenizer is None:
            self._tokenizer = find_tokenizer(self.tokenizer_path, self.texts)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def windows_per_batch(self) -> int:
        """Windows per step on all devices together."""
        return self.batch_size * self._world_size()

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a global batch on each device; 1 without a global batch."""
        return 1 if self._global_batch() is None else self._accumulate()

    def setup(self, stage: str) -> None:
        texts = self.texts
        if self.trainer is not None and self.trainer.world_size > 1:
            # one process per node downloads what is missing. Lightning's prepare_data waits in another process
            # group, which gloo sometimes cannot connect after a restart, and then waits forever
            if self.trainer.local_rank == 0:
                for text in texts:
                    read_splits(text, self.train_ratio, self.tokenizer)
            self.trainer.strategy.barrier()
        if not self._windows:
            self._cut_windows(texts)
        if stage == "fit" and (self.trainer is None or self.trainer is not self._checked):
            self._check_batches(len(self._windows["training"]))
            self._checked = self.trainer

    def _cut_windows(self, texts: list[str]) -> None:
        length = self._length()
        if self.trainer is not None:
            self._check_model()
        of_texts = []
        for text in texts:
            splits = read_splits(text, self.train_ratio, self.tokenizer)._asdict()
            of_text = {
                name: WindowDataset(parts, length, self.stride or length)
                for name, parts in splits.items()
            }
            for name, windows in of_text.items():
                if not len(windows):
                    if self.mixture is not None and name == "validation" and not windows.tokens:
                        continue  # a store for training alone; other texts are validated on
                    if is_store(Path(os.path.expanduser(text))):
                        raise ValueError(
                            f"data.text: the {name} split of {text} has {windows.tokens} tokens, one window needs "
                            f"{length + 1}; prepare it again with more in that split (--val_ratio)"
                        )
                    raise ValueError(
                        f"data.text: the {name} split of {text} has {windows.tokens} tokens, one window "
                        f"needs {length + 1}; give more text, a smaller model.config.context_length or "
                        "another data.train_ratio"
                    )
            of_texts.append(of_text)
        if not any(len(of_text["validation"]) for of_text in of_texts):
            raise ValueError(
                "data.mixture: none of its stores has a validation split; prepare one with --val_ratio"
            )
        self._counts = [len(of_text["training"]) for of_text in of_texts]
        self._windows = {
            name: of_texts[0][name]
            if self.mixture is None
            else ConcatWindowDataset([of_text[name] for of_text in of_texts if len(of_text[name])])
            for name in of_texts[0]
        }

    def _check_batches(self, count: int) -> None:
        """Verify that there are enough windows, and set the trainer's accumulation for a global batch."""
        world_size, per_batch = self._world_size(), self.windows_per_batch
        if count < world_size:
            raise ValueError(
                f"trainer.devices: {world_size} are more than the {count} training windows; take fewer, "
                "or give more text"
            )
        if count < per_batch:
            raise ValueError(
                f"data.batch_size: {self.batch_size} on {world_size} device(s) is more than "
                f"the {count} training windows; make it smaller"
            )
        step = self._global_batch()
        if step is None:
            return
        if step.windows > count:
            raise ValueError(
                f"{step.setting}: {step.windows * step.unit} is more than the {count} training windows"
                f"{f' of {step.unit} tokens' if step.unit > 1 else ''}; make it smaller"
            )
        given = self.trainer.accumulate_grad_batches if self.trainer else 1
        accumulate = step.micro_batches(self.batch_size, world_size, given, count)
        if self.trainer is None:
            return
        self.trainer.accumulate_grad_batches = accumulate
        limit = (
            self.trainer.limit_train_batches
        )  # in global batches, so that all steps are complete
        batches = batches_of_epoch(
            count, per_batch, accumulate=accumulate, whole_steps=True, limit=limit
        )
        if not batches and limit:
            raise ValueError(
                f"trainer.limit_train_batches: {limit} leaves none of the {count // step.windows} optimizer steps of an epoch; "
                "give more"
            )
        self.trainer.limit_train_batches = batches

    @property
    def has_global_batch(self) -> bool:
        """Whether the windows per optimizer step are given, on any number of devices."""
        return self._global_batch() is not None

    def epoch_shape(self) -> EpochShape:
        """Shape of an epoch on this data, with the trainer's limit."""
        batches, accumulate = self.train_dataloader().batches, self._accumulate()
        return EpochShape(batches, accumulate, self.windows_per_batch * self._length())

    def _accumulate(self) -> int:
        """Batches per optimizer step."""
        if (step := self._global_batch()) is not None:
            return step.windows // self.windows_per_batch
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    def _global_batch(self) -> GlobalBatch | None:
        if self.global_batch_size is None and self.global_batch_tokens is None:
            return None  # needs no window length
        return global_batch(
            self.global_batch_size,
            self.global_batch_tokens,
            self._length(),
            self.windows_per_batch,
            sum(self._counts) or None,
        )

    def train_dataloader(self) -> ResumableDataLoader:
        """Training windows in a random order; a last batch that would be short is dropped, as in the book.

        With ``trainer.overfit_batches`` each epoch has the same first windows.
        """
        loader = self._loader(
            "training",
            shuffle=self._is_shuffled(),
            drop_last=True,
            accumulate=self._accumulate(),
            whole_steps=self._global_batch() is not None,
            mixture=None
            if self.mixture is None
            else MixtureSampler(self._counts, list(self.mixture.values()), self.seed),
        )
        limit = self.trainer.limit_train_batches if self.trainer else None
        if isinstance(limit, float):
            limit = int(limit * len(loader))
        loader.max_batches = limit
        return loader

    def _is_shuffled(self) -> bool:
        return self.trainer is None or not self.trainer.overfit_batches  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides which windows a run sees, and in which order."""
        return {
            "context_length": self._length(),
            "stride": self.stride or self._length(),
            "document_mask": self.document_mask,
            "rng": self.rng,
            # the book's order is drawn on the global generator, whose state is in the checkpoint
            "seed": self.seed if self.rng == "step" else None,
            "shuffled": self._is_shuffled(),
            "mixture": None
            if self.mixture is None
            else [list(pair) for pair in zip(self._counts, self.mixture.values(), strict=True)],
            **{f"{split}_sha256": windows.fingerprint for split, windows in self._windows.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Verify that a run resumes with the windows it had.

        Raises:
            ValueError: A setting or the text differs.
        """
        check_same_windows(state_dict, self.state_dict())

    @property
    def tokens(self) -> int:
        """Tokens of both splits of all texts."""
        return sum(windows.tokens for windows in self._windows.values())

    def described(self) -> dict[str, Any]:
        """The text and its windows, for a result that names what was measured."""
        return {
            "text": self.text if self.mixture is None else list(self.mixture),
            "context_length": self._length(),
            "stride": self.stride or self._length(),
            "train_windows": len(self._windows["training"]),
            "val_windows": len(self._windows["validation"]),
        }

    def validation_windows(self) -> ResumableDataLoader:
        return self._loader("validation", shuffle=False, drop_last=False)

    def val_dataloader(self) -> ResumableDataLoader | list[ResumableDataLoader]:
        """The validation windows; for ``trainer.validate`` a list of them and of all training windows.

        ``validates_training = False`` leaves the training windows out.
        """
        validates = self.trainer is not None and self.trainer.state.fn == "validate"
        if validates and self.validates_training:
            training = self._loader("training", shuffle=False, drop_last=False)
            return [self.validation_windows(), training]
        return self.validation_windows()

    def _loader(self, split: str, **settings: Any) -> ResumableDataLoader:
        return ResumableDataLoader(
            self._windows[split],
            self.batch_size,
            seed=self.seed,
            rng=self.rng,
            num_workers=self.num_workers,
            pin_memory=self._on_gpu(),
            documents=self.document_mask,
            end_of_text_id=self.tokenizer.end_of_text_id,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self._world_size(),
            **settings,
        )

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _length(self) -> int:
        return self.context_length or int(self._model_config().context_length)

    def _check_model(self) -> None:
        model = self._model_config()
        of_module: Any = self.trainer.lightning_module.tokenizer  # type: ignore[union-attr]
        if not self.tokenizer.equals(of_module):
            raise ValueError(
                f"data.tokenizer: the data's is {self.tokenizer}, the module's is {of_module}; set module.tokenizer"
            )
        if model.vocab_size < self.tokenizer.vocab_size:
            raise ValueError(
                f"model.config.vocab_size: {model.vocab_size} is less than the tokenizer's "
                f"{self.tokenizer.vocab_size}; give that or more"
            )
        window_length(self.context_length, model.context_length)

    def _model_config(self) -> Any:
        """The GPTConfig of the model that the trainer trains on this data."""
        if self.trainer is None:
            raise ValueError(
                "data.context_length: is needed, since there is no trainer with a model; give it"
            )
        return self.trainer.lightning_module.config


def _check_mixture(mixture: dict[str, float], rng: Rng) -> None:
    if not mixture:
        raise ValueError("data.mixture: is empty; give texts with their weights, or data.text")
    for text, weight in mixture.items():
        if not 0.0 < weight < math.inf:
            raise ValueError(f"data.mixture: {text} has the weight {weight}; give more than 0")
    if rng == "global":
        raise ValueError("data.mixture: the book's order is for one text; leave out --rng global")
