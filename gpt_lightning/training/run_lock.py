"""Lock of a run's folder: only one process at a time trains a run."""

import hashlib
import json
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from gpt_lightning.storage.atomic import replace

logger = logging.getLogger(__name__)

LOCK = ".lock"
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 60.0  # without a heartbeat, of a process on another machine
CLAIM_SECONDS = 10.0


class RunLock:
    """Lock file ``.lock`` in the run's folder, which names the process that trains the run.

    A lock is stale when its process has ended; then it is taken over. A process on this machine is looked up in the
    process table: its number, start time and boot id must match. A process on another machine, or in another
    container, is alive while its heartbeat is recent: it renews the file's time four times a minute.

    Rank 0 takes the lock for all ranks of a run. Restarts by torchrun are the same job, and take it over.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._token = secrets.token_hex(8)
        self._made: list[Path] = []
        self._released = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def acquire(self, folder: Path) -> None:
        """Lock the run.

        Raises:
            ValueError: Another process trains it.
            OSError: The folder cannot be made or written.
        """
        self._make(folder)
        path = folder / LOCK
        while not self._create(path):
            try:
                holder, age = _read(path)
            except FileNotFoundError:
                continue
            if _is_alive(holder, age):
                raise ValueError(
                    f"run: {folder} is being trained by process {holder.get('pid', '?')} on "
                    f"{holder.get('host', 'an unknown host')} since {holder.get('since', '?')}; wait until it "
                    "ends, or give this run another name with --run NAME"
                )
            if self._take_over(path, holder):
                break
        self._path = path
        threading.Thread(target=self._beat, args=(path,), daemon=True).start()

    def release(self) -> None:
        """Unlock, and remove the folders that :meth:`acquire` made if they are empty."""
        self._released.set()
        with suppress(OSError, ValueError):
            if self._path is not None and self._is_own(self._path):
                self._path.unlink()
        self._path = None
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()
        self._made = []

    def _make(self, folder: Path) -> None:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(folder, error) from error
        finally:
            self._made = [each for each in missing if each.is_dir()]

    def _create(self, path: Path) -> bool:
        """Create the lock file; return ``False`` if there is one."""
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        except OSError as error:
            raise _not_writable(path.parent, error) from error
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({**_this_process(), "token": self._token}, file)
        return True

    def _take_over(self, path: Path, stale: dict[str, Any]) -> bool:
        """Replace a stale lock; return ``False`` if another process was faster.

        Several processes may find the same lock stale. The one that creates the claim file may replace it.
        """
        content = json.dumps(stale, sort_keys=True)
        claim = path.with_name(f"{LOCK}.{hashlib.sha256(content.encode()).hexdigest()[:16]}")
        if not self._create(claim):
            with suppress(FileNotFoundError):
                if time.time() - claim.stat().st_mtime > CLAIM_SECONDS:  # its process was killed
                    claim.unlink()
            time.sleep(0.01)
            return False
        try:
            if _read(path)[0] != stale:
                return False
            replace(claim, path)
        except FileNotFoundError:
            return False
        finally:
            claim.unlink(missing_ok=True)
        return True

    def _is_own(self, path: Path) -> bool:
        return bool(_read(path)[0].get("token") == self._token)

    def _beat(self, path: Path) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                if not self._is_own(path):
                    logger.warning(
                        f"run: {path} now belongs to another process, which trains this run too; stop one of them"
                    )
                    return
                os.utime(path)
            except FileNotFoundError:
                logger.warning(
                    f"run: {path} was removed, so another process can train this run too"
                )
                return
            except OSError:  # a network that fails for a time
                continue


def _not_writable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"checkpoint: {folder} cannot be written ({error.strerror}); give another --trainer.default_root_dir"
    )


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "started": psutil.Process(pid).create_time(),
        "boot": _boot_id(),
        "namespace": _pid_namespace(),
        "job": _job(),
    }


def _boot_id() -> str:
    """Return an id that changes with each start of the machine; empty where it is not needed.

    Linux counts a process's start time from the start of the machine. Windows and macOS record the time of day.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    """Return the id of the process namespace: each container numbers its processes separately."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _job() -> str:
    """Return torchrun's id of the job, which all its restarts share; empty without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if run_id == "none" else run_id


def _read(path: Path) -> tuple[dict[str, Any], float]:
    """Return a lock's process, and the seconds since its last heartbeat by the file system's clock."""
    text = path.read_text(encoding="utf-8", errors="replace")
    with tempfile.TemporaryFile(dir=path.parent) as now:
        age = os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
    try:
        holder = json.loads(text)
    except ValueError:  # it is being written, or was damaged
        holder = None
    return holder if isinstance(holder, dict) else {}, age


def _is_alive(holder: dict[str, Any], age: float) -> bool:
    own = _this_process()
    if own["job"] and holder.get("job") == own["job"]:
        return False
    if holder.get("host") == own["host"]:
        if holder.get("boot") != own["boot"]:
            return False
        if holder.get("namespace") == own["namespace"]:
            return _is_running(holder.get("pid"), holder.get("started"))
    return age < STALE_SECONDS


def _is_running(pid: Any, started: Any) -> bool:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, TypeError, ValueError):
        return False
    except psutil.AccessDenied:
        return True
