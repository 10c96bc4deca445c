"""Number of batches, optimizer steps and tokens of an epoch and of a run; used by ``fit`` and ``plan``."""

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

    def steps_of_run(self, max_steps: int, max_epochs: int | None) -> int | None:
        """Optimizer steps of a run with Lightning's limits, where -1 or None is no limit; None: it has none."""
        limits = [max_steps] if max_steps >= 0 else []
        if max_epochs is not None and max_epochs >= 0:
            limits.append(max_epochs * self.steps)
        return min(limits, default=None)


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
