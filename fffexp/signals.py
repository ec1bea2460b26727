"""SIGTERM as an exception."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminated_by_signal() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that runs are marked and the exit status is not 0."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
