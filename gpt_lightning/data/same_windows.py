"""Whether a run resumes with the windows it had."""

from collections.abc import Mapping
from typing import Any

# what decides windows → the setting, where that is not of the data
_SETTINGS = {"rng": "rng", "seed": "seed_everything", "shuffled": "trainer.overfit_batches"}


def check_same_windows(recorded: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compare what decides the windows of a run with what a checkpoint recorded (``TextDataModule.state_dict``).

    Raises:
        ValueError: A setting or the text differs.
    """
    remedy = "resume with what it had, or begin a new run with --init_from"
    for key, here in own.items():
        there = recorded.get(key)
        if there == here:
            continue
        match key:
            case "training_sha256" | "validation_sha256":
                split = key.removesuffix("_sha256")
                raise ValueError(
                    f"data.text: the {split} text is not the one that the run had (another text, or another "
                    f"data.train_ratio); {remedy}"
                )
            case "mixture":
                what = f"the run has drawn on {_described(there)}, here is {_described(here)}"
            case "shuffled":
                what = f"the run was {'begun without' if there else 'begun with'} it"
            case _:
                what = f"the run has {there}, here is {here}"
        raise ValueError(f"{_SETTINGS.get(key, f'data.{key}')}: {what}; {remedy}")


def _described(sources: list[list[float]] | None) -> str:
    """Windows and weight of each source, in words; None: no mixture."""
    if sources is None:
        return "one text"
    total = sum(weight for _, weight in sources)
    return ", ".join(f"{weight / total:.4g} of {count:.0f} windows" for count, weight in sources)
