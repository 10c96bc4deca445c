"""Processes that take a way of training or decoding each, so that a peer can have an interpreter of its own."""

import json
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

ComparisonTask = Literal["train", "decode"]
HERE = Path(__file__).resolve().parent


class Worker:
    """A process of peers.py that goes one way, once each time it is asked to."""

    def __init__(
        self, task: ComparisonTask, python: str, way: str, settings: dict[str, Any]
    ) -> None:
        self._way = way
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 — open while the process lives
        self._process = subprocess.Popen(
            [python, str(HERE / "peers.py"), task, way, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._read()  # "ready"

    def go(self) -> float:
        """Its seconds."""
        return float(self._ask("go"))

    def peak_memory(self) -> int:
        """Bytes resident at most so far."""
        return int(self._ask("memory"))

    def end(self) -> None:
        self._process.communicate()
        self._errors.close()

    def _ask(self, what: str) -> str:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died; reading says why
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line.strip()
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        raise RuntimeError(f"{self._way}: ended with {code}: {last}")
