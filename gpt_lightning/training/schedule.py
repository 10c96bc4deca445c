"""The learning rate of each optimizer step, and the first step whose gradients are clipped."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

# a number of optimizer steps (int) or a share of the run (float): 1 is a step, 1.0 is the end of the run
Steps = int | float

LRSchedule = Literal["constant", "cosine", "linear", "wsd", "inverse_sqrt"]
DecayType = Literal["linear", "1-sqrt", "cosine"]

_DECAYING = ("cosine", "linear", "wsd")  # the schedules with a last step of the decay
_REMEDY = "give a whole number, such as 10, or a share, such as 0.2"
STEP_SETTINGS = ("warmup_steps", "decay_steps", "clip_from_step")


@dataclass(frozen=True)
class Schedule:
    """Learning rate and clipping as functions of the optimizer step, which counts from 0.

    The warmup is linear and ends at step ``warmup_steps``. :meth:`learning_rate` has the formulas of what follows it.

    Attributes:
        lr: Learning rate after the warmup.
        min_lr: Learning rate at the end of the decay; with ``inverse_sqrt`` the lowest one.
        initial_lr: Learning rate of step 0; step ``warmup_steps`` has ``lr``, as in appendix D of the book. ``None``:
            step 0 has ``lr / warmup_steps``, and step ``warmup_steps - 1`` has ``lr``.
        warmup_steps, decay_steps, clip_from_step: Numbers of steps, or shares of the run. ``None``: the decay ends
            with the run, if there is one; all steps are clipped.
        lr_schedule: What follows the warmup. ``None``: cosine where ``decay_steps`` is given, else constant.
        decay_fraction: Share of the steps before ``decay_steps``, the last ones, that the decay of ``wsd`` takes;
            ``None``: 0.2.
        decay_type: Shape of the decay of ``wsd``; ``None``: linear.
    """

    lr: float
    min_lr: float = 0.0
    initial_lr: float | None = None
    warmup_steps: Steps = 0
    decay_steps: Steps | None = None
    clip_from_step: Steps | None = None
    lr_schedule: LRSchedule | None = None
    decay_fraction: float | None = None
    decay_type: DecayType | None = None

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
        self._check_names()
        self._fill_defaults()
        warmup, decay = self.warmup_steps, self.decay_steps
        if type(decay) is type(warmup) and decay <= warmup:
            raise ValueError(
                f"model.decay_steps: {decay} is not after the {warmup} warmup_steps; "
                "give more, or --model.lr_schedule constant without it"
            )
        if isinstance(warmup, int) and isinstance(decay, int) and self.decay_start < warmup:
            raise ValueError(
                f"model.decay_fraction: {self.decay_fraction} of {decay} steps starts the decay at step "
                f"{self.decay_start}, before the end of the {warmup} warmup_steps; give less"
            )

    def _check_names(self) -> None:
        """Check the schedule and that each setting has an effect on it."""
        if self.lr_schedule is not None:
            _check_choice("lr_schedule", self.lr_schedule, get_args(LRSchedule))
        if self.lr_schedule in ("constant", "inverse_sqrt") and self.decay_steps is not None:
            raise ValueError(
                f"model.lr_schedule: {self.lr_schedule} has no end of a decay, and model.decay_steps is "
                f"{self.decay_steps}; leave one of them out"
            )
        if self.lr_schedule == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError(
                "model.lr_schedule: inverse_sqrt takes its time scale from the warmup, which has no steps; give "
                "model.warmup_steps"
            )
        if self.lr_schedule != "wsd":
            for name in ("decay_fraction", "decay_type"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f"model.{name}: {value} has an effect only with model.lr_schedule wsd; give that, or leave "
                        "it out"
                    )
        fraction = self.decay_fraction
        if fraction is not None and not 0.0 < fraction <= 1.0:
            raise ValueError(
                f"model.decay_fraction: {fraction} is not a share of the run; give more than 0 and at most 1, such "
                "as 0.2"
            )
        if self.decay_type is not None:
            _check_choice("decay_type", self.decay_type, get_args(DecayType))

    def _fill_defaults(self) -> None:
        def fill(name: str, default: object) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)  # the class is frozen

        fill("lr_schedule", "constant" if self.decay_steps is None else "cosine")
        if self.lr_schedule in _DECAYING:
            fill("decay_steps", 1.0)
        if self.lr_schedule == "wsd":
            fill("decay_fraction", 0.2)
            fill("decay_type", "linear")

    @property
    def has_shares(self) -> bool:
        """Whether some steps depend on the length of the run."""
        return any(isinstance(value, float) for value in self._steps().values())

    def resolve(self, run_steps: int | None) -> "Schedule":
        """Return the schedule of a run, without shares: a share of the run is rounded down.

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
            return Schedule(self.lr)
        counts = self._counts(run_steps)
        if self.decay_steps is not None and counts["decay_steps"] <= counts["warmup_steps"]:
            raise ValueError(
                f"model.decay_steps: {self.decay_steps} is step {counts['decay_steps']} of {run_steps}, which is not after "
                f"the {counts['warmup_steps']} steps of model.warmup_steps {self.warmup_steps}; give more"
            )
        return replace(
            self,
            warmup_steps=counts["warmup_steps"],
            decay_steps=counts.get("decay_steps"),
            clip_from_step=counts.get("clip_from_step"),
        )

    @property
    def decay_start(self) -> int:
        """The step at which the decay starts; only for a schedule without shares that has a decay."""
        assert isinstance(self.decay_steps, int)
        assert isinstance(self.warmup_steps, int)
        if self.decay_fraction is None:
            return self.warmup_steps
        return self.decay_steps - _share_of(self.decay_fraction, self.decay_steps)

    def moved_decay(self, before: int, now: int) -> int | None:
        """Return the step at which ``wsd`` starts its decay in a run of ``before`` steps, if ``now`` steps move it."""
        if self.decay_fraction is None:
            return None
        ends = [self._counts(steps)["decay_steps"] for steps in (before, now)]
        starts = [end - _share_of(self.decay_fraction, end) for end in ends]
        return None if starts[0] == starts[1] else starts[0]

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
            name: _share_of(value, run_steps) if isinstance(value, float) else value
            for name, value in self._steps().items()
        }

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step ``step``; only for a schedule without shares.

        With w = ``warmup_steps``, e = ``decay_steps``, s = :attr:`decay_start` and p = (step - s) / (e - s), the
        progress of the decay, the rate after the warmup is:

        - ``constant``: lr.
        - ``cosine``: min_lr + (lr - min_lr) (1 + cos(pi p)) / 2 with s = w, one period of SGDR (Loshchilov and Hutter
          2017, arXiv:1608.03983, equation 5).
        - ``linear``: min_lr + (lr - min_lr) (1 - p) with s = w, as in BERT (Devlin et al. 2019, arXiv:1810.04805,
          appendix A.2).
        - ``wsd``, warmup-stable-decay: lr until step s, then a decay by the factor 1 - p (``linear``),
          1 - sqrt(p) (``1-sqrt``) or (1 + cos(pi p)) / 2 (``cosine``) instead of 1 - p above. The three phases are
          those of MiniCPM (Hu et al. 2024, arXiv:2404.06395, section 4), ``linear`` and ``1-sqrt`` those of Hägele
          et al. 2024, arXiv:2405.18392.
        - ``inverse_sqrt``: lr sqrt(w / step), but not below min_lr. It is the rate of the Transformer (Vaswani et al.
          2017, arXiv:1706.03762, equation 3) with lr for its peak.

        A decay stays at min_lr from step e on. The warmup rises linearly (Goyal et al. 2017, arXiv:1706.02677,
        section 2.2).
        """
        warmup = self.warmup_steps
        if step < warmup:
            if self.initial_lr is None:
                return self.lr * (step + 1) / warmup
            return self.initial_lr + step * (self.lr - self.initial_lr) / warmup
        if self.lr_schedule == "inverse_sqrt":
            return max(self.min_lr, self.lr * math.sqrt(warmup / step))
        if self.decay_steps is None or step < self.decay_start:
            return self.lr
        if step >= self.decay_steps:
            return self.min_lr
        progress = (step - self.decay_start) / (self.decay_steps - self.decay_start)
        shape = self.decay_type or self.lr_schedule
        if shape == "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            factor = 1.0 - (math.sqrt(progress) if shape == "1-sqrt" else progress)
        return self.min_lr + (self.lr - self.min_lr) * factor

    def clips(self, step: int) -> bool:
        """Return whether the gradients of step ``step`` are clipped, if ``trainer.gradient_clip_val`` is given."""
        return self.clip_from_step is None or step >= self.clip_from_step


def _share_of(share: float, steps: int) -> int:
    """A share of steps, rounded down. It is the decimal number that was given: 0.29 of 100 is 29, not 28.99…."""
    return math.floor(Fraction(str(share)) * steps)


def _check_steps(name: str, value: Steps) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"model.{name}: {value!r} is not a number; {_REMEDY}")
    if isinstance(value, float) and not 0.0 <= value <= 1.0:
        raise ValueError(
            f"model.{name}: {value} is neither a whole number of steps nor a share of the run from 0.0 to 1.0; {_REMEDY}"
        )
    if value < 0:
        raise ValueError(f"model.{name}: {value} is negative; give 0 or more")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"model.{name}: {value} is unknown; give {' or '.join(choices)}")
