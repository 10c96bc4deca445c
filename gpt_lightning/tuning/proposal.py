"""Which settings a trial tries: a function of the seed, the number of the trial and the other trials."""

import json
from collections.abc import Collection
from typing import Literal

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from gpt_lightning.data.sampler import FeistelPermutation, seed_from
from gpt_lightning.tuning.space import Params, Space

Sampler = Literal["tpe", "random", "grid"]
MAX_DRAWS = 20  # of a sampler that repeats what was tried


def propose(
    space: Space,
    sampler: Sampler,
    key: tuple[int, int, int],
    tried: Collection[str],
    trials: Collection[FrozenTrial],
) -> Params:
    """Settings that no other trial has, if there are any left.

    A space whose combinations can be numbered is permuted by the seed. ``grid`` and ``random`` take the combination
    at the trial's number, so that no two trials have the same one, whichever process runs them.

    Args:
        key: Seed, number of the trial, and draws of this trial that another process was faster with.
        tried: :func:`as_text` of the settings of the other trials.
        trials: The other trials, from which TPE learns.
    """
    seed, number, _ = key
    if space.size is not None:
        order = FeistelPermutation(space.size, seed)
        if sampler != "tpe":
            return _point(space, order, number % space.size)
    draws = _Draws(space, sampler, seed_from(*key), trials)
    for _ in range(MAX_DRAWS):
        params = draws.draw()
        if as_text(params) not in tried:
            return params
    if space.size is not None:
        for position in range(space.size):
            if as_text(params := _point(space, order, position)) not in tried:
                return params
    return params


def as_text(params: Params) -> str:
    """JSON of the settings, in which 1, 1.0 and true differ."""
    return json.dumps(params)


def _point(space: Space, order: FeistelPermutation, position: int) -> Params:
    return space.point(int(order(np.array([position]))[0]))


class _Draws:
    """Optuna's sampler on a copy of the study in memory, so that a draw can be rejected."""

    def __init__(
        self, space: Space, sampler: Sampler, seed: int, trials: Collection[FrozenTrial]
    ) -> None:
        self._space = space
        seed %= 1 << 32  # NumPy takes no more
        kind = optuna.samplers.TPESampler if sampler == "tpe" else optuna.samplers.RandomSampler
        self._study = optuna.create_study(sampler=kind(seed=seed))
        for trial in trials:
            if trial.params:
                self._study.add_trial(trial)

    def draw(self) -> Params:
        trial = self._study.ask(self._space.distributions())
        return self._space.from_optuna(trial.params)
