"""The database of a study: what cannot be used is one line, and a password is in no message."""

import logging
import socket
from pathlib import Path

import pytest

from fake_tune import FOLDER, fake_study
from gpt_lightning.tuning.storage import StudyStorage
from gpt_lightning.tuning.study import TuneStudy

SECRET = "s3cret-word"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"{SECRET}@host", "storage: is not a URL of a database; give one such as postgresql://"),
        (f"oracle9://u:{SECRET}@h/db", "storage: oracle9 is not a database; give sqlite"),
        (f"mysql+nodriver://u:{SECRET}@h/db", "storage: mysql+nodriver is not a database"),
        (f"mssql+pyodbc://u:{SECRET}@h/db", "storage: mssql+pyodbc needs the Python package"),
        ("sqlite:////nowhere/at/all/study.db", "storage: sqlite:////nowhere/at/all/study.db cannot be used ("),
    ],
)  # fmt: skip
def test_url_that_cannot_be_used_is_one_line(url: str, message: str) -> None:
    with pytest.raises(ValueError, match="storage") as raised:
        StudyStorage(url).connect()
    line = str(raised.value)
    assert line.startswith(message)
    assert "; " in line
    assert "\n" not in line
    assert SECRET not in line


def test_server_that_is_not_there_is_one_line_without_the_password() -> None:
    port = free_port()
    for url in (
        f"postgresql://user:{SECRET}@127.0.0.1:{port}/db",
        f"postgresql+psycopg://user@127.0.0.1:{port}/db?password={SECRET}",
    ):
        storage = StudyStorage(url)
        with pytest.raises(ValueError, match="cannot be used") as raised:
            storage.connect()
        line = str(raised.value)
        assert f"postgresql://127.0.0.1:{port}/db cannot be used (" in line
        assert "refused" in line
        for secret in (SECRET, "user"):
            assert secret not in line.split("(")[0]
        assert SECRET not in line
        assert SECRET not in storage.shown


def test_file_with_braces_in_its_path_is_a_database(tmp_path: Path) -> None:
    (tmp_path / "{a}").mkdir()
    fake_study(url=f"sqlite:///{tmp_path}/{{a}}/study.db")
    assert (tmp_path / "{a}" / "study.db").is_file()


def test_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_text("not a database, and longer than the header of SQLite" * 20)
    with pytest.raises(ValueError, match=r"a\.db cannot be used \(file is not a database\)"):
        StudyStorage(f"sqlite:///{tmp_path / 'a.db'}").connect()


def test_looking_for_a_study_creates_nothing(tmp_path: Path) -> None:
    storage = StudyStorage(f"sqlite:///{tmp_path / 'none.db'}")
    assert not storage.has_tables()
    with pytest.raises(ValueError, match=r"none\.db has no study study"):
        TuneStudy.load(storage, FOLDER)
    assert [*tmp_path.iterdir()] == []


def test_password_is_in_no_log(postgresql: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    fake_study(url=postgresql)
    assert SECRET in postgresql
    assert SECRET not in caplog.text
    wrong = postgresql.replace(SECRET, "wr0ng-word")
    with pytest.raises(ValueError, match="authentication failed") as raised:
        StudyStorage(wrong).connect()
    assert "wr0ng-word" not in str(raised.value)
