"""Fixtures of the tests of tuning."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from gpt_lightning.tuning import worker


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, and the worker as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "COMMAND", worker.COMMAND)
    monkeypatch.setattr(worker, "POLL_SECONDS", worker.POLL_SECONDS)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """URL of a server of Debian's package, which this fixture starts; it listens on a socket only."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not binaries:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    binary = binaries[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))  # a socket's path must be short
    user: str | None = None
    if os.getuid() == 0:  # the server refuses root
        user = "postgres"
        shutil.chown(folder, user)
    data, log = folder / "data", folder / "log"
    password = folder / "password"
    password.write_text("s3cret-word\n", encoding="utf-8")
    password.chmod(0o644)

    def run(*command: object) -> None:
        subprocess.run(
            [*map(str, command)], check=True, capture_output=True, cwd=folder, user=user, group=user,
            extra_groups=None if user is None else [],
        )  # fmt: skip

    run(binary / "initdb", "-D", data, "-U", "tuner", "-A", "scram-sha-256", "--pwfile", password,
        "--no-sync")  # fmt: skip
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    run(binary / "pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "start")
    try:
        yield f"postgresql://tuner:s3cret-word@/DATABASE?host={folder}"
    finally:
        run(binary / "pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture
def postgresql(postgresql_server: str, tmp_path: Path) -> str:
    """URL of an empty database."""
    name = f"test_{abs(hash(tmp_path))}"
    with psycopg.connect(
        postgresql_server.replace("DATABASE", "postgres"), autocommit=True
    ) as server:
        server.execute(f"CREATE DATABASE {name}".encode())
    return postgresql_server.replace("DATABASE", name)
