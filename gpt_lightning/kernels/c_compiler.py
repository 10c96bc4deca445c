"""Compile this package's C code for the CPU it runs on, once on a machine."""

import ctypes
import hashlib
import os
import platform
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
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
FLAGS_X86 = ("-mprefer-vector-width=512",)
# lines of /proc/cpuinfo that decide what -march=native is, on x86 and on ARM
CPU_LINES = ("model name", "flags", "Features", "CPU implementer", "CPU part")
COMPILE_SECONDS = 60


def compiler_unsupported_reason() -> str | None:
    """Why no C code can be compiled here; ``None`` if it can be tried."""
    if sys.platform != "linux":
        return "it is compiled on Linux only"
    try:
        has_compiler = find_compiler() is not None
    except OSError:
        return None  # the user's mistake is reported when it is tried
    return None if has_compiler else "no C compiler is installed (gcc or clang)"


def find_compiler() -> list[str] | None:
    """The command of the environment variable ``CC``, otherwise the first of :data:`COMPILERS` that is installed.

    Raises:
        OSError: ``CC`` has a quotation mark too many or too few.
    """
    try:
        command = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise OSError(f"CC: cannot be read ({error})") from error
    if command:
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
    flags = FLAGS + (FLAGS_X86 if platform.machine() == "x86_64" else ())
    library = folder / f"{source.stem}-{_key(source, compiler, flags)}.so"
    if library.exists():
        status = library.stat()
        if sys.platform != "win32" and (
            status.st_uid not in (0, os.getuid()) or status.st_mode & stat.S_IWOTH
        ):
            raise OSError(f"{library} can be written by other users")
        try:
            return ctypes.CDLL(str(library))
        except OSError:
            library.unlink()  # it is damaged
    _compile([*compiler, *flags], source, library)
    return ctypes.CDLL(str(library))


def _key(source: Path, compiler: list[str], flags: tuple[str, ...]) -> str:
    """Hash of everything that decides what the compiler writes."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    features = [line for line in cpu.splitlines() if line.split(":")[0].strip() in CPU_LINES]
    executable = os.path.realpath(shutil.which(compiler[0]) or compiler[0])
    version = os.stat(executable).st_size, os.stat(executable).st_mtime_ns
    parts = (source.read_bytes(), compiler, executable, version, flags, features)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _compile(command: list[str], source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        output = Path(folder) / library.name
        try:
            result = subprocess.run(
                [*command, "-x", "c", str(source), "-o", str(output), "-lm"],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=COMPILE_SECONDS,
                env={**os.environ, "LC_ALL": "C"},
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{command[0]} took more than {COMPILE_SECONDS} seconds") from error
        if result.returncode != 0:
            lines = result.stderr.splitlines()
            causes = [line for word in ("cannot find", "error") for line in lines if word in line]
            raise OSError(f"{command[0]} failed: {(causes or ['no message'])[0].strip()}")
        with output.open("r+b") as file:
            os.fsync(file.fileno())
        output.chmod(0o700)
        os.replace(output, library)  # other processes see the complete file or none
