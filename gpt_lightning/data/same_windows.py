"""Check that a resumed run reads the same windows as the run that saved its checkpoint."""

from collections.abc import Mapping
from typing import Any

# what decides windows → its setting, if that is not data.NAME
_SETTING_NAMES = {"rng": "rng", "seed": "seed_everything", "shuffled": "trainer.overfit_batches"}


def check_same_windows(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare what decides the windows of a run with what a checkpoint recorded (``TextDataModule.state_dict``).

    Raises:
        ValueError: A setting or the text differs.
    """
    remedy = "resume with what it had, or start a new run with --init_from"
    for key, now in current.items():
        before = recorded.get(key)
        if before == now:
            continue
        match key:
            case "training_sha256" | "validation_sha256":
                split = key.removesuffix("_sha256")
                raise ValueError(
                    f"data.text: the {split} text is not the one that the run had (another text, or another "
                    f"data.train_ratio); {remedy}"
                )
            case "mixture":
                cause = f"the run has drawn on {_described(before)}, here is {_described(now)}"
            case "shuffled":
                cause = f"the run was started {'without' if before else 'with'} it"
            case _:
                cause = f"the run has {before}, here is {now}"
        raise ValueError(f"{_SETTING_NAMES.get(key, f'data.{key}')}: {cause}; {remedy}")


def _described(mixture: list[list[float]] | None) -> str:
    """Windows and weight of each text, in words. ``None``: there is no mixture."""
    if mixture is None:
        return "one text"
    total = sum(weight for _, weight in mixture)
    return ", ".join(f"{weight / total:.4g} of {count:.0f} windows" for count, weight in mixture)
