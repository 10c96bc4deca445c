"""Script with the behavior of ``fit`` and ``validate`` that ``tune`` sees, without a model: it starts in a moment.

The loss of ``model.lr`` is ``(lr - 0.5)² + 1`` at the end, and one more at the start. ``fake.end`` says how a run ends:
``done``, ``error``, ``crash``, ``killed``, ``nan``. Each of ten steps takes ``fake.seconds``.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

STEPS = 10


def main(verb: str, arguments: list[str]) -> int:
    options = dict(each.removeprefix("--").partition("=")[::2] for each in arguments)
    folder = Path("checkpoints") / options["run"]
    loss = (float(options["model.lr"]) - 0.5) ** 2 + 1
    end = options.get("fake.end", "done")
    if verb == "validate":
        print(json.dumps({"val_loss": float("nan") if end == "nan" else loss}))
        return 0
    return fit(folder, loss, end, float(options.get("fake.seconds", 0.0)))


def fit(folder: Path, loss: float, end: str, seconds: float) -> int:
    checkpoint, metrics = folder / "last.ckpt", folder / "metrics.csv"
    first = int(checkpoint.read_text(encoding="utf-8")) if checkpoint.exists() else 0
    (folder / "config.yaml").write_text(f"trainer: {{max_steps: {STEPS}}}\n", encoding="utf-8")
    with (folder / "starts").open("a", encoding="utf-8") as file:
        file.write(f"{first} {os.environ.get('OMP_NUM_THREADS')}\n")
    if not first:
        metrics.write_text("step,tokens_seen,val_loss\n", encoding="utf-8")
    stopped = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    for step in range(first, STEPS):
        with metrics.open("a", encoding="utf-8") as file:
            file.write(f"{step},{100 * step},{loss + 1 - step / STEPS}\n")
        time.sleep(seconds)
        checkpoint.write_text(str(step + 1), encoding="utf-8")
        if stopped:
            return 143
    if end == "error":
        print("gpt_lightning: error: train/loss: is not finite; give less", file=sys.stderr)
        return 1
    if end == "crash":
        raise MemoryError("out of memory on the device")
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
