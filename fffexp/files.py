"""Files and stores that one process at a time writes, whole or not at all."""

import hashlib
import json
import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fffexp.errors import UserError, hide_password


def strict_json(value: Any) -> Any:
    """As JSON has it, with None for numbers that are not finite, which it does not know."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def save_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    replace(path, (json.dumps(strict_json(content), indent=1) + "\n").encode())


def replace(path: Path, content: bytes) -> Path:
    """Write a file so that no reader sees half of it; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def hold(path: Path | None) -> AbstractContextManager[object]:
    """Keep other commands from a file, which would write what they found there at first; a UserError if one has it."""
    if path is None:
        return nullcontext()
    # not the file itself, which is replaced at each writing
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    try:
        return FileLock(Path(tempfile.gettempdir()) / f"fffexp-{name}.lock").acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{path}: another command writes it: wait for that, or give another file") from error


def store_lock(uri: str, timeout_s: float = 30.0) -> AbstractContextManager[object]:
    """Only one process at a time creates a store's tables, which two can break for good, or decides what is left to do.

    A tracking server by http has locks of its own. A store that cannot be created, reached or locked is a UserError.
    """
    problem = "is of a kind that is not known here"
    cause: Exception | None = None
    fix = "give sqlite:///FILE, postgresql+psycopg://... or, for tracking, http(s)://..."
    try:
        if uri.startswith(("http://", "https://")):
            return nullcontext()
        if uri.startswith("sqlite:///"):
            path = Path(uri.removeprefix("sqlite:///"))
            path.parent.mkdir(parents=True, exist_ok=True)
            return FileLock(f"{path}.lock", timeout=timeout_s).acquire()  # creating takes a few seconds
        if uri.startswith("postgresql"):
            import sqlalchemy

            connection = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect()
            # any number that nobody else is likely to lock; held by the connection, so it goes with it
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(230814711)"))
            return connection
    except OSError as error:  # filelock's Timeout is one
        problem, fix, cause = f"cannot be created ({error})", "give a path that can be written", error
    except ImportError as error:
        problem = f"needs a driver ({first_line(error)})"
        fix = "pip install 'fffexp[postgres]' and write postgresql+psycopg://..."
    except Exception as error:  # every driver has errors of its own
        problem, fix, cause = f"cannot be reached ({first_line(error)})", "start it, or give another", error
    raise UserError(f"the store {hide_password(uri)} {problem}: {fix}") from cause


def first_line(error: Exception) -> str:
    """What an error of a database or server says first, without a password."""
    return hide_password((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]
