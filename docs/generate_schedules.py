"""Generator of ``docs/images/schedules.png``: the learning rate of each schedule.

Usage: ``python docs/generate_schedules.py``. The picture records a checksum of its curves. A test compares it with the
schedules, so that the picture shows what the code does.
"""

import hashlib
import json
from pathlib import Path

from gpt_lightning.figure import Figure
from gpt_lightning.palette import SERIES
from gpt_lightning.training.schedule import Schedule

PICTURE = Path(__file__).parent / "images" / "schedules.png"
STEPS = 1000
PEAK = 0.001
WARMUP = 100


def main() -> None:
    figure = draw()
    figure.savefig(PICTURE, format="png", dpi=80, metadata={"Description": checksum()})


def curves() -> dict[str, dict[str, list[float]]]:
    """The learning rate of each step, by panel and label."""
    names = ("constant", "cosine", "linear", "wsd", "inverse_sqrt")
    types = ("linear", "1-sqrt", "cosine")
    common = {"lr": PEAK, "warmup_steps": WARMUP}
    schedules = {
        "model.lr_schedule": {name: Schedule(**common, lr_schedule=name) for name in names},
        "model.decay_type of wsd": {
            name: Schedule(**common, lr_schedule="wsd", decay_type=name) for name in types
        },
    }
    return {
        panel: {
            label: [schedule.resolve(STEPS).learning_rate(step) for step in range(STEPS)]
            for label, schedule in lines.items()
        }
        for panel, lines in schedules.items()
    }


def checksum() -> str:
    """A checksum of the curves, to 10 digits, which do not depend on the machine."""
    rounded = json.loads(json.dumps(curves()), parse_float=lambda text: f"{float(text):.10g}")
    return hashlib.sha256(json.dumps(rounded).encode()).hexdigest()


def draw() -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    all_axes = figure.subplots(1, 2, sharey=True)
    for axes, (panel, lines) in zip(all_axes, curves().items(), strict=True):
        for (label, rates), color in zip(lines.items(), SERIES, strict=False):
            axes.plot(rates, label=label, color=color)
        axes.set_title(panel)
        axes.set_xlabel("optimizer step")
        axes.legend(loc="lower left", bbox_to_anchor=(0.14, 0.0))
    all_axes[0].set_ylabel("learning rate")
    return figure


if __name__ == "__main__":
    main()
