"""Files that a command writes whole or not at all, and that two commands never write at once."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from fffexp.errors import UserError


def strict_json(value: Any) -> Any:
    """The same with null for numbers that are not finite, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: strict_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    replace(path, (json.dumps(strict_json(content), indent=1, allow_nan=False) + "\n").encode())


def replace(path: Path, content: bytes) -> Path:
    """Write a file so that no reader sees half of it; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def hold(path: Path | None) -> AbstractContextManager[object]:
    """Keep other commands from the file, each of which would write what it found there at its start.

    Raises:
        UserError: another command has it.
    """
    from filelock import FileLock, Timeout

    if path is None:
        return nullcontext()
    # not the file itself, which is replaced at each writing
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    try:
        return FileLock(Path(tempfile.gettempdir()) / f"fffexp-{name}.lock").acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{path}: another command writes it: wait for that, or give another file") from error
