"""The learning rate of each optimizer step, and the first step whose gradients are clipped."""

import math
from dataclasses import dataclass, replace

# a number of optimizer steps (int) or a share of the run (float): 1 is a step, 1.0 is the end of the run
Steps = int | float

_REMEDY = "give a whole number, such as 10, or a share, such as 0.2"
STEP_SETTINGS = ("warmup_steps", "decay_steps", "clip_from_step")


@dataclass(frozen=True)
class Schedule:
    """Learning rate and clipping as functions of the optimizer step, which counts from 0.

    The warmup is linear and ends at step ``warmup_steps``. After it the learning rate is constant, or a cosine that
    reaches ``min_lr`` at step ``decay_steps`` and stays there.

    Attributes:
        lr: Learning rate after the warmup.
        min_lr: Learning rate at the end of the decay.
        initial_lr: Learning rate of step 0; step ``warmup_steps`` has ``lr``, as in appendix D of the book. ``None``:
            step 0 has ``lr / warmup_steps``, and step ``warmup_steps - 1`` has ``lr``.
        warmup_steps, decay_steps, clip_from_step: Numbers of steps, or shares of the run. ``None``: no decay; all
            steps are clipped.
    """

    lr: float
    min_lr: float = 0.0
    initial_lr: float | None = None
    warmup_steps: Steps = 0
    decay_steps: Steps | None = None
    clip_from_step: Steps | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "initial_lr"):
            value = getattr(self, name)
            if value is None:
                continue
            if not 0.0 <= value < math.inf:
                raise ValueError(f"model.{name}: {value} is out of range; give 0 or more")
            if value > self.lr:
                raise ValueError(f"model.{name}: {value} is above model.lr {self.lr}; give less")
        for name, value in self._steps().items():
            _check_steps(name, value)
        warmup, decay = self.warmup_steps, self.decay_steps
        if type(decay) is type(warmup) and decay <= warmup:
            raise ValueError(
                f"model.decay_steps: {decay} is not after the {warmup} warmup_steps; "
                "give more, or leave it out for a constant rate"
            )

    @property
    def has_shares(self) -> bool:
        """Whether some steps depend on the length of the run."""
        return any(isinstance(value, float) for value in self._steps().values())

    def resolve(self, run_steps: int | None) -> "Schedule":
        """Return the schedule of a run, without shares: a share of the run is ``int(share * run_steps)``.

        Args:
            run_steps: Optimizer steps of the run; ``None``: the run has no end.

        Raises:
            ValueError: The run has no end to take a share of, or the decay ends before the warmup.
        """
        if run_steps is None:
            for name, value in self._steps().items():
                if isinstance(value, float):
                    raise ValueError(
                        f"model.{name}: {value} is a share of the run, which has no end; give a number of steps, or "
                        "--trainer.max_steps"
                    )
            return self
        if run_steps == 0:  # nothing is trained
            return replace(self, warmup_steps=0, decay_steps=None, clip_from_step=None)
        counts = self._counts(run_steps)
        if self.decay_steps is not None and counts["decay_steps"] <= counts["warmup_steps"]:
            raise ValueError(
                f"model.decay_steps: {self.decay_steps} is step {counts['decay_steps']} of {run_steps}, which is not after "
                f"the {counts['warmup_steps']} steps of model.warmup_steps {self.warmup_steps}; give more"
            )
        return replace(self, **counts)

    def check_clipping(self, run_steps: int | None) -> None:
        """Check that a run clips at least one step.

        Raises:
            ValueError: The first step to clip is after the end of the run.
        """
        if run_steps and self._counts(run_steps).get("clip_from_step", 0) >= run_steps:
            unit = "step" if run_steps == 1 else "steps"
            raise ValueError(
                f"model.clip_from_step: {self.clip_from_step} is beyond the run, which has {run_steps} {unit}; give less, "
                "or leave it and trainer.gradient_clip_val out"
            )

    def changes(self, before: int, now: int) -> list[str]:
        """Return what a run of ``now`` steps does at other steps than one of ``before`` steps, in words."""
        counts, earlier = self._counts(now), self._counts(before)
        return [
            f"model.{name} {value} is {counts[name]} steps (was {earlier[name]})"
            for name, value in self._steps().items()
            if counts[name] != earlier[name]
        ]

    def _steps(self) -> dict[str, Steps]:
        """The settings in steps or shares that are given."""
        values = {name: getattr(self, name) for name in STEP_SETTINGS}
        return {name: value for name, value in values.items() if value is not None}

    def _counts(self, run_steps: int) -> dict[str, int]:
        return {
            name: int(value * run_steps) if isinstance(value, float) else value
            for name, value in self._steps().items()
        }

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step ``step``; only for a schedule without shares."""
        warmup = self.warmup_steps
        if step < warmup:
            if self.initial_lr is None:
                return self.lr * (step + 1) / warmup
            return self.initial_lr + step * (self.lr - self.initial_lr) / warmup
        if self.decay_steps is None:
            return self.lr
        progress = min(1.0, (step - warmup) / max(1, self.decay_steps - warmup))
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def clips(self, step: int) -> bool:
        """Return whether the gradients of step ``step`` are clipped, if ``trainer.gradient_clip_val`` is given."""
        return self.clip_from_step is None or step >= self.clip_from_step


def _check_steps(name: str, value: Steps) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"model.{name}: {value!r} is not a number; {_REMEDY}")
    if isinstance(value, float) and not 0.0 <= value <= 1.0:
        raise ValueError(
            f"model.{name}: {value} is neither a whole number of steps nor a share of the run from 0.0 to 1.0; {_REMEDY}"
        )
    if value < 0:
        raise ValueError(f"model.{name}: {value} is negative; give 0 or more")
