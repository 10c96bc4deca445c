"""Database of a study: its URL, whose password is never shown, and the connection."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import URL, Engine, create_engine, inspect, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

CONNECT_SECONDS = 10
SQLITE_LOCK_SECONDS = 60  # that a process waits for another one's write
ATTEMPTS = 6  # to create the tables, when several processes do it at once


def sqlite_url(path: Path) -> URL:
    return URL.create("sqlite", database=str(path.resolve()))


class StudyStorage:
    """Storage of Optuna behind a URL.

    Attributes:
        shown: The URL without user, password and options, for messages.
        is_file: Whether it is an SQLite file, which only this machine or its shared folder has.
    """

    def __init__(self, url: str | URL) -> None:
        """Parse the URL.

        Raises:
            ValueError: It is not a database's; the message is one line.
        """
        try:
            parsed = make_url(url)
        except ArgumentError:
            raise ValueError(
                "storage: is not a URL of a database; give one such as postgresql://USER@HOST/DATABASE"
            ) from None  # the message of SQLAlchemy may have the password
        if parsed.drivername == "postgresql":  # the driver that the extra installs
            parsed = parsed.set(drivername="postgresql+psycopg")
        self._url = parsed
        self.is_file = parsed.get_backend_name() == "sqlite"
        shown = URL.create(
            parsed.get_backend_name(), host=parsed.host, port=parsed.port, database=parsed.database
        )
        self.shown = shown.render_as_string()

    @property
    def file(self) -> Path | None:
        """The file of SQLite; ``None`` for a server."""
        return Path(self._url.database or "") if self.is_file else None

    def connect(self) -> RDBStorage:
        """Connect, and create Optuna's tables if they are missing.

        Raises:
            ValueError: The database cannot be reached or used; the message is one line.
        """
        with self.errors():
            self._engine().dispose()  # an unknown driver, or a server that is not there
            for attempt in range(ATTEMPTS):
                try:
                    # Optuna replaces {...} in a URL
                    url = self._text.replace("{", "{{").replace("}", "}}")
                    return RDBStorage(url, engine_kwargs=self._engine_settings)
                except RuntimeError as error:
                    raise ValueError(
                        f"storage: {self.shown} is of another version of Optuna; run 'optuna storage upgrade'"
                    ) from error
                except (DBAPIError, StorageInternalError):
                    if attempt == ATTEMPTS - 1:
                        raise
                    time.sleep(0.2 * (attempt + 1))  # another process creates the same tables
            raise AssertionError

    def has_tables(self) -> bool:
        """Whether a study was ever saved here; creates nothing.

        Raises:
            ValueError: The database cannot be reached or used; the message is one line.
        """
        if self.file is not None and not self.file.is_file():
            return False
        with self.errors():
            engine = self._engine()
            try:
                return inspect(engine).has_table("studies")
            finally:
                engine.dispose()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn errors of the database into one line without the password.

        Raises:
            ValueError: The database cannot be reached or used.
        """
        try:
            yield
        except (SQLAlchemyError, StorageInternalError) as error:
            raise ValueError(
                f"storage: {self.shown} cannot be used ({self._cause(error)}); check the URL and the server"
            ) from None  # the traceback of SQLAlchemy may have the password

    def _engine(self) -> Engine:
        """An engine that has connected once."""
        try:
            engine = create_engine(self._text, **self._engine_settings)
        except NoSuchModuleError:
            raise ValueError(
                f"storage: {self._url.drivername} is not a database; give sqlite, postgresql or mysql"
            ) from None
        except ImportError as error:
            raise ValueError(
                f"storage: {self._url.drivername} needs the Python package {error.name}; install it with pip"
            ) from error
        engine.connect().close()
        return engine

    @property
    def _text(self) -> str:
        return self._url.render_as_string(hide_password=False)

    @property
    def _engine_settings(self) -> dict[str, Any]:
        timeouts = {
            "sqlite": {"timeout": SQLITE_LOCK_SECONDS},
            "postgresql": {"connect_timeout": CONNECT_SECONDS},
            "mysql": {"connect_timeout": CONNECT_SECONDS},
        }
        # without a pool no connection stays open for the hours of a trial
        return {
            "connect_args": timeouts.get(self._url.get_backend_name(), {}),
            "poolclass": NullPool,
        }

    def _cause(self, error: BaseException) -> str:
        """The database's own message, on one line, without what is secret in the URL."""
        while error.__cause__ is not None:
            error = error.__cause__
        text = " ".join(str(getattr(error, "orig", None) or error).split())
        secrets = [self._url.password, *self._url.query.values()]
        for secret in secrets:
            for each in (secret,) if isinstance(secret, str) else secret or ():
                text = text.replace(each, "***")
        return text[:200]
