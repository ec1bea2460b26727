"""Result files that a command completes when it is called again."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fffexp.errors import UserError


@contextmanager
def hold(path: Path | None) -> Iterator[None]:
    """Keep other commands from the file, each of which would write what it found there at its start.

    Raises:
        UserError: another command has it.
    """
    if path is None:
        yield
        return
    # not the file itself, which is replaced at each writing
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"fffexp-{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"--json {path}: another command is at it: wait for that, or give another file") from error
    try:
        yield
    finally:
        lock.release()


def check_figure(path: Path, option: str) -> None:
    """Make sure, before anything is measured, that a figure can be drawn where this option wants it.

    Raises:
        UserError: it is no PNG, or its place cannot be written to.
    """
    if path.suffix != ".png":
        raise UserError(f"{option}: figure {path}: name a file that ends in .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: figure {path}: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(
            f"{option}: figure {path}: {'it is a folder' if path.is_dir() else 'its folder cannot be written to'}"
        )


def load(path: Path | None, kind: dict[str, Any]) -> dict[str, Any] | None:
    """What the file holds, or None where there is none yet; it is made sure that it can be written.

    Raises:
        UserError: it cannot be read or written, or says something else than `kind` of what it is.
    """
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            file.seek(0)
            text = file.read()
        if not text:
            return None
        found = json.loads(text)
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--json {path}: no JSON: {error}: give another file, or remove it") from error
    if not isinstance(found, dict) or {key: found.get(key) for key in kind} != kind:
        raise UserError(f"--json {path}: it holds another measurement: give another file, or remove it")
    return found


def save(path: Path | None, found: dict[str, Any]) -> None:
    """Write it, if there is a path: whole or not at all."""
    if path:
        made = path.with_suffix(".tmp")
        made.write_text(json.dumps(found, indent=1) + "\n")
        made.replace(path)
