"""Databases that several processes create and fill together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy
from filelock import FileLock

from fffexp.errors import UserError, hide_password

LOCK_S = 30.0  # creating a store takes a few seconds
# any number that nobody else is likely to lock in the same PostgreSQL database
ADVISORY_KEY = 230814711


@contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """Only one process at a time creates a store's tables or decides what is left to do.

    Two processes that create a SQLite store at once can break it for good. A tracking server by http has
    locks of its own.

    Raises:
        UserError: the store cannot be created or reached, or is of a kind that cannot be locked.
    """
    if uri.startswith("sqlite:///"):
        with _file_lock(uri):
            yield
    elif uri.startswith("postgresql"):
        with _connection(uri) as connection:
            # held by the connection, so it goes with it
            connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({ADVISORY_KEY})"))
            yield
    elif uri.startswith(("http://", "https://")):
        yield
    else:
        raise UserError(
            f"the store {hide_password(uri)} is of a kind that is not known here:"
            " give sqlite:///FILE, postgresql+psycopg://... or, for tracking, http(s)://..."
        )


@contextmanager
def _file_lock(uri: str) -> Iterator[None]:
    path = Path(uri.removeprefix("sqlite:///"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} cannot be written")
        lock = FileLock(f"{path}.lock", timeout=LOCK_S)
        lock.acquire()
    except OSError as error:  # filelock's Timeout is one
        raise UserError(f"the store {uri} cannot be created ({error}): give a path that can be written") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _connection(uri: str) -> Iterator[sqlalchemy.Connection]:
    try:
        connection = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect()
    except ImportError as error:
        raise UserError(
            f"the store {hide_password(uri)} needs a driver ({first_line(error)}):"
            " pip install 'fffexp[postgres]' and write postgresql+psycopg://..."
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, ValueError) as error:
        raise UserError(
            f"the store {hide_password(uri)} cannot be reached ({first_line(error)}): start it, or give another"
        ) from error
    with connection:
        yield connection


def first_line(error: Exception) -> str:
    """What an error of a database or server says first, without a password."""
    return hide_password((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]
