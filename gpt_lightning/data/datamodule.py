"""A text as Lightning's data: split, tokenised once, cut into windows."""

from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray

from gpt_lightning.data.tokenizer import VOCAB_SIZE
from gpt_lightning.data.tokens import read_splits
from gpt_lightning.data.windows import Rng, WindowLoader, windows


class TextDataModule(LightningDataModule):
    """Sliding windows over a text, the first part of it for training, the rest for validation.

    Args:
        text: 'verdict' (The Verdict, from the cache or downloaded), 'sample' (a story that comes with
            the package), a text file, a folder of .txt and .md files, or what prepare has written.
        train_ratio: Share of the characters that is for training, from the start of the text; what
            prepare has written is split already.
        context_length: Tokens in a window; none: the model's context_length.
        stride: Tokens from one window's start to the next; none: the window's length.
        batch_size: Windows a step on each device.
        num_workers: Threads that read batches ahead; the batches are the same with any number.
        seed: What the order of the windows depends on.
        rng: 'step': the order is a function of seed and epoch. 'global': it is drawn on torch's global
            generator, as the book's is.
    """

    def __init__(
        self,
        text: str = "verdict",
        train_ratio: float = 0.9,
        context_length: int | None = None,
        stride: int | None = None,
        batch_size: int = 2,
        num_workers: int = 0,
        seed: int = 123,
        rng: Rng = "step",
    ) -> None:
        super().__init__()
        for name, value in [
            ("context_length", context_length),
            ("stride", stride),
            ("batch_size", batch_size),
        ]:
            if value is not None and value < 1:
                raise ValueError(f"data.{name}: {value} is too small; give 1 or more")
        if num_workers < 0:
            raise ValueError(f"data.num_workers: {num_workers} is negative; give 0 or more")
        if not 0.0 < train_ratio < 1.0:
            raise ValueError(
                f"data.train_ratio: {train_ratio} leaves a split empty; give a share between 0 and 1"
            )
        self.text = text
        self.train_ratio = train_ratio
        self.context_length = context_length
        self.stride = stride
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.rng: Rng = rng
        self._windows: dict[str, NDArray[np.uint16]] = {}

    def setup(self, stage: str) -> None:
        if self.trainer is not None and self.trainer.world_size > 1:
            # one process a node downloads what is missing. Lightning's prepare_data waits without end in a
            # group of its own, which gloo at times does not get connected after a restart
            if self.trainer.local_rank == 0:
                read_splits(self.text, self.train_ratio)
            self.trainer.strategy.barrier()
        if self._windows:
            return
        length = self.context_length or self._model_config().context_length
        if self.trainer is not None:
            self._check_model(length)
        found: dict[str, NDArray[np.uint16]] = {}
        splits = read_splits(self.text, self.train_ratio)
        for name, (tokens,) in splits._asdict().items():
            found[name] = windows(tokens, length, self.stride or length)
            if not len(found[name]):
                raise ValueError(
                    f"data.text: the {name} split of {self.text} has {len(tokens)} tokens, one window "
                    f"needs {length + 1}; give more text, a smaller model.config.context_length or "
                    "another data.train_ratio"
                )
        count = len(found["training"])
        if stage == "fit" and count < self.batch_size * self._world_size():
            raise ValueError(
                f"data.batch_size: {self.batch_size} on {self._world_size()} device(s) is more than "
                f"the {count} training windows; make it smaller"
            )
        self._windows = found

    def train_dataloader(self) -> WindowLoader:
        """A pass in a random order; a last batch that would be short is dropped, as in the book."""
        loader = self._loader("training", shuffle=True, drop_last=True)
        limit = self.trainer.limit_train_batches if self.trainer else None
        if isinstance(limit, float):
            limit = int(limit * len(loader))
        loader.max_batches = limit
        return loader

    def validation_windows(self) -> WindowLoader:
        return self._loader("validation", shuffle=False, drop_last=False)

    def val_dataloader(self) -> WindowLoader | list[WindowLoader]:
        """The validation windows; for ``trainer.validate`` a list of them and of all training windows."""
        if self.trainer is not None and self.trainer.validating:
            every = self._loader("training", shuffle=False, drop_last=False)
            return [self.validation_windows(), every]
        return self.validation_windows()

    def _loader(self, split: str, **settings: Any) -> WindowLoader:
        return WindowLoader(
            self._windows[split],
            self.batch_size,
            seed=self.seed,
            rng=self.rng,
            num_workers=self.num_workers,
            pin_memory=self._on_gpu(),
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self._world_size(),
            **settings,
        )

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _check_model(self, length: int) -> None:
        model = self._model_config()
        if model.vocab_size < VOCAB_SIZE:
            raise ValueError(
                f"model.config.vocab_size: {model.vocab_size} is less than the tokenizer's "
                f"{VOCAB_SIZE}; give that or more"
            )
        if length > model.context_length:
            raise ValueError(
                f"data.context_length: {length} is more than the model's {model.context_length}; "
                "leave it out to take the model's"
            )

    def _model_config(self) -> Any:
        """The GPTConfig of the model that the trainer trains on this data."""
        if self.trainer is None:
            raise ValueError("data.context_length: needed where no trainer tells the model's")
        return self.trainer.lightning_module.config
