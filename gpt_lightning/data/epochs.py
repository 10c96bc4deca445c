"""How many windows, batches, optimizer steps and tokens an epoch and a run have, for both ``fit`` and ``plan``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochShape:
    """An epoch of a run.

    Attributes:
        batches: Micro-batches on each device.
        accumulate: Micro-batches of an optimizer step; an epoch's last step may have fewer.
        tokens_per_batch: On all devices together.
    """

    batches: int
    accumulate: int
    tokens_per_batch: int

    @property
    def steps(self) -> int:
        return -(-self.batches // self.accumulate)

    @property
    def tokens(self) -> int:
        return self.batches * self.tokens_per_batch

    def tokens_after(self, steps: int) -> int:
        """Tokens that a run has seen after so many optimizer steps."""
        epochs, steps = divmod(steps, self.steps)
        return epochs * self.tokens + steps * self.accumulate * self.tokens_per_batch

    def steps_for(self, tokens: int, *, after_batches: int = 0) -> int:
        """Optimizer steps to see ``tokens`` or more, from ``after_batches`` of an epoch on."""
        epochs, tokens = divmod(after_batches * self.tokens_per_batch + tokens, self.tokens)
        last = -(-tokens // (self.accumulate * self.tokens_per_batch))
        return epochs * self.steps + last - -(-after_batches // self.accumulate)

    def steps_of_run(
        self, max_steps: int, max_epochs: int | None, max_tokens: int | None = None
    ) -> int | None:
        """Optimizer steps of a run with these limits, where -1 or None is no limit; ``None``: it has none."""
        limits = [max_steps] if max_steps >= 0 else []
        if max_epochs is not None and max_epochs >= 0:
            limits.append(max_epochs * self.steps)
        if max_tokens is not None:
            limits.append(self.steps_for(max_tokens))
        return min(limits, default=None)


@dataclass(frozen=True)
class GlobalBatch:
    """The windows of an optimizer step, over all devices and accumulated micro-batches.

    Attributes:
        setting: Name of the setting that gives them.
        windows: How many.
        unit: How much of the setting one window is: 1, or its tokens.
    """

    setting: str
    windows: int
    unit: int

    def micro_batches(
        self, batch_size: int, devices: int, given: int = 1, max_windows: int | None = None
    ) -> int:
        """Return the micro-batches of a step on each device.

        Args:
            batch_size: Windows of a micro-batch on one device.
            given: ``trainer.accumulate_grad_batches``; 1 is its default.
            max_windows: Training windows; ``None``: not known.

        Raises:
            ValueError: The batch cannot be split, or ``given`` contradicts it.
        """
        micro_batches, rest = divmod(self.windows, batch_size * devices)
        size = self.windows * self.unit
        if rest:
            nearest = nearest_multiple(self.windows, batch_size * devices, max_windows)
            raise ValueError(
                f"{self.setting}: {size} cannot be split over {devices} device(s) with a batch_size of "
                f"{batch_size}; the nearest that can is {nearest * self.unit}"
            )
        if given not in (1, micro_batches):
            raise ValueError(
                f"trainer.accumulate_grad_batches: {given} contradicts {self.setting} {size}, which is "
                f"{micro_batches} batches of {batch_size} on {devices} device(s); leave it out"
            )
        return micro_batches


def global_batch(
    size: int | None,
    tokens: int | None,
    length: int,
    windows_per_batch: int,
    max_windows: int | None = None,
) -> GlobalBatch | None:
    """Return the batch of ``data.global_batch_size`` or ``data.global_batch_tokens``; ``None`` if neither is given.

    Args:
        length: Tokens of a window.
        windows_per_batch: Windows of a micro-batch on all devices.
        max_windows: Training windows; ``None``: not known.

    Raises:
        ValueError: The tokens are not complete windows.
    """
    if tokens is None:
        return None if size is None else GlobalBatch("data.global_batch_size", size, 1)
    if tokens % length:
        max_tokens = None if max_windows is None else max_windows * length
        raise ValueError(
            f"data.global_batch_tokens: {tokens} is not a multiple of the window length, {length} tokens; "
            f"the nearest multiple is {nearest_multiple(tokens, length * windows_per_batch, max_tokens)}"
        )
    return GlobalBatch("data.global_batch_tokens", tokens // length, length)


def window_length(context_length: int | None, model_context_length: int) -> int:
    """Return the tokens of a window: ``data.context_length``, or as many as the model reads.

    Raises:
        ValueError: The model reads fewer.
    """
    length = context_length or model_context_length
    if length > model_context_length:
        raise ValueError(
            f"data.context_length: {length} is more than the model's {model_context_length}; "
            "leave it out to take the model's"
        )
    return length


def batches_of_epoch(
    windows: int,
    windows_per_batch: int,
    *,
    accumulate: int = 1,
    whole_steps: bool = False,
    limit: float | None = None,
) -> int:
    """Micro-batches of an epoch on each device. A last batch that would be short is left out.

    Args:
        windows: Training windows.
        windows_per_batch: On all devices together.
        accumulate: Micro-batches of an optimizer step.
        whole_steps: Whether a last step of fewer micro-batches is left out too, as with a global batch.
        limit: Lightning's ``limit_train_batches``: a number of batches (int) or a share of them (float). With
            ``whole_steps`` it counts global batches, so that it means the same for any ``data.batch_size``.
    """
    batches = windows // windows_per_batch
    units = batches // accumulate if whole_steps else batches
    if isinstance(limit, float):
        units = int(limit * units)
    elif limit is not None:
        units = min(limit, units)
    return units * accumulate if whole_steps else units


def nearest_multiple(value: int, step: int, maximum: int | None = None) -> int:
    """The multiple of ``step`` nearest to ``value``, at least ``step``, at most ``maximum``; of two the larger."""
    times = (value + step // 2) // step
    if maximum is not None:
        times = min(times, maximum // step)
    return max(1, times) * step
