"""Worker processes that run one backend of training or decoding each, so that a peer can use another interpreter."""

import json
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

ComparisonTask = Literal["train", "decode"]
HERE = Path(__file__).resolve().parent


class Worker:
    """A process of peers.py. It runs its backend once for each call of :meth:`go`."""

    def __init__(
        self, task: ComparisonTask, python: str, backend: str, settings: dict[str, Any]
    ) -> None:
        self._backend = backend
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 — open while the process lives
        self._process = subprocess.Popen(
            [python, str(HERE / "peers.py"), task, backend, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._read()  # "ready"

    def go(self) -> float:
        """Run once; the seconds it took."""
        return float(self._ask("go"))

    def peak_memory(self) -> int:
        """Peak resident memory of the process so far, in bytes."""
        return int(self._ask("memory"))

    def end(self) -> None:
        self._process.communicate()
        self._errors.close()

    def _ask(self, request: str) -> str:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has died; _read reports why
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line.strip()
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        raise RuntimeError(f"{self._backend}: ended with {code}: {last}")
