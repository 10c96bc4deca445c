"""``verify-resume``: proves on the user's machine that a killed run loses nothing."""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path


def run(arguments: list[str]) -> int:
    """Train N + M updates straight, and again with a SIGKILL after N and a resume; compare the two.

    Takes all settings of fit (--config, --data.text, --trainer.devices 2, …) and trains as they say, in a
    temporary folder. Weights, optimizer, counters and the windows of every update must be the same bits;
    exit code 1 names the first difference.
    """
    own, fit_arguments = _parser().parse_known_args(arguments)
    if "--print_config" in fit_arguments:
        from gpt_lightning.cli.fit import fit

        return fit(fit_arguments)
    for name in ("steps", "more_steps"):
        if getattr(own, name) < 1:
            raise ValueError(f"{name}: {getattr(own, name)} is too small; give 1 or more")
    from gpt_lightning.cli.tables import writable_folder
    from gpt_lightning.training.verify_resume import verify_resume

    def say(what: str) -> None:
        print(f"verify-resume: {what}", file=sys.stderr, flush=True)

    with _terminated_by_exit(), tempfile.TemporaryDirectory(prefix="verify-resume-") as scratch:
        folder = writable_folder(own.out) if own.out else Path(scratch)
        if any(folder.iterdir()):
            raise ValueError(f"out: {folder} is not empty; give another folder")
        compared = verify_resume(fit_arguments, folder.resolve(), own.steps, own.more_steps, say)
    exact = not any(part.difference for part in compared)
    if own.json:
        parts = [asdict(part) for part in compared]
        print(json.dumps({"exact": exact, "steps": own.steps, "more_steps": own.more_steps,
                          "compared": parts}))  # fmt: skip
    else:
        print(f"{'':<10} {'straight':<18} {'killed and resumed':<18}")
        for part in compared:
            verdict = "DIFFERENT" if part.difference else "the same bits"
            print(f"{part.part:<10} {part.straight[:16]}   {part.resumed[:16]}   {verdict}")
    for part in compared:
        if part.difference:
            print(
                f"gpt_lightning: error: {part.part}: {part.difference}; resume is not exact here",
                file=sys.stderr,
            )
            break
    return 0 if exact else 1


@contextmanager
def _terminated_by_exit() -> Iterator[None]:
    """So that SIGTERM too ends what is under way, and cleans up."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    # a plain parser, for it leaves what it does not know to fit
    parser = argparse.ArgumentParser(
        prog="gpt_lightning verify-resume", description=run.__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("--steps", type=int, default=10, help="Updates before the kill (N); default: %(default)s.")
    add("--more_steps", type=int, default=10, help="Updates after it (M); default: %(default)s.")
    add("--out", help="An empty folder to keep both runs in; default: a temporary one.")
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser
