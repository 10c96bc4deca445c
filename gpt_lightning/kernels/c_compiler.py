"""Compile this package's C code for the CPU it runs on, once on a machine."""

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

COMPILERS = ("gcc", "cc", "clang")
# -march=native: the code runs on this CPU only. Results stay those of IEEE arithmetic, NaN included.
FLAGS = (
    "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
    "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
COMPILE_SECONDS = 60


def compiler_unsupported_reason() -> str | None:
    """Why no C code can be compiled here; ``None`` if it can be tried."""
    if sys.platform != "linux":
        return "it is compiled on Linux only"
    if find_compiler() is None:
        return "no C compiler is installed (gcc or clang)"
    return None


def find_compiler() -> list[str] | None:
    """The command of the environment variable ``CC``, otherwise the first of :data:`COMPILERS` that is installed."""
    if command := shlex.split(os.environ.get("CC", "")):
        return command if shutil.which(command[0]) else None
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def load_library(source: Path, folder: Path) -> ctypes.CDLL:
    """The compiled ``source``. It is compiled if ``folder`` does not have it for this CPU and compiler.

    Raises:
        OSError: It cannot be compiled, written or loaded; the message has one line.
    """
    compiler = find_compiler()
    if compiler is None:
        raise OSError("no C compiler is installed")
    library = folder / f"{source.stem}-{_key(source, compiler)}.so"
    if not library.exists():
        _compile(compiler, source, library)
    status = library.stat()
    if sys.platform != "win32" and (
        status.st_uid not in (0, os.getuid()) or status.st_mode & stat.S_IWOTH
    ):
        raise OSError(f"{library} can be written by other users")
    return ctypes.CDLL(str(library))


def _key(source: Path, compiler: list[str]) -> str:
    """Hash of everything that decides what the compiler writes."""
    cpu = (
        Path("/proc/cpuinfo")
        .read_text(encoding="utf-8", errors="replace")
        .split("\n\n")[0]
        .splitlines()
    )
    features = [line for line in cpu if line.split(":")[0].strip() in ("model name", "flags", "Features")]  # fmt: skip
    executable = shutil.which(compiler[0]) or ""
    size_and_time = os.stat(executable).st_size, os.stat(executable).st_mtime_ns
    parts = (source.read_bytes(), compiler, os.path.realpath(executable), size_and_time, FLAGS, features)  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        output = Path(folder) / library.name
        command = [*compiler, *FLAGS, str(source), "-o", str(output), "-lm"]
        try:
            result = subprocess.run(
                command,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=COMPILE_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{compiler[0]} took more than {COMPILE_SECONDS} seconds") from error
        if result.returncode != 0:
            errors = [line for line in result.stderr.splitlines() if "error" in line]
            raise OSError(f"{compiler[0]} failed: {(errors or ['no message'])[0].strip()}")
        os.replace(output, library)  # other processes see the complete file or none
