"""Databases that several processes create and fill together."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import sqlalchemy
from filelock import FileLock

from fffexp.errors import UserError, hide_password

LOCK_S = 30.0  # creating a store takes a few seconds
# any number that nobody else is likely to lock in the same PostgreSQL database
ADVISORY_KEY = 230814711


def store_lock(uri: str) -> AbstractContextManager[object]:
    """Only one process at a time creates a store's tables or decides what is left to do.

    Two processes that create a SQLite store at once can break it for good. A tracking server by http has
    locks of its own.

    Raises:
        UserError: the store cannot be created or reached, or is of a kind that cannot be locked.
    """
    if uri.startswith(("http://", "https://")):
        return nullcontext()
    try:
        if uri.startswith("sqlite:///"):
            path = Path(uri.removeprefix("sqlite:///"))
            path.parent.mkdir(parents=True, exist_ok=True)
            return FileLock(f"{path}.lock", timeout=LOCK_S).acquire()
        if uri.startswith("postgresql"):
            connection = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect()
            # held by the connection, so it goes with it
            connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({ADVISORY_KEY})"))
            return connection
        problem = "is of a kind that is not known here"
        fix = "give sqlite:///FILE, postgresql+psycopg://... or, for tracking, http(s)://..."
    except OSError as error:  # filelock's Timeout is one
        problem, fix = f"cannot be created ({error})", "give a path that can be written"
    except ImportError as error:
        problem = f"needs a driver ({first_line(error)})"
        fix = "pip install 'fffexp[postgres]' and write postgresql+psycopg://..."
    except (sqlalchemy.exc.SQLAlchemyError, ValueError) as error:
        problem, fix = f"cannot be reached ({first_line(error)})", "start it, or give another"
    raise UserError(f"the store {hide_password(uri)} {problem}: {fix}")


def first_line(error: Exception) -> str:
    """What an error of a database or server says first, without a password."""
    return hide_password((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]
