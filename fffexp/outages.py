"""Stores and servers that do not answer for a while: they are asked again, for minutes, and nothing is lost."""

import functools
import os
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from requests import RequestException
from sqlalchemy.exc import InterfaceError, OperationalError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from fffexp.errors import report
from fffexp.files import first_line

PATIENCE_S = float(os.environ.get("FFFEXP_PATIENCE_S") or 600)
SLOW_S = 5.0  # a call that takes longer has waited for somebody's lock
P = ParamSpec("P")
T = TypeVar("T")

_asking = threading.local()
_last = float("-inf")


def is_outage(error: BaseException | None) -> bool:
    """Whether an error says that a store or server does not answer, or is locked; any other would come again."""
    while error is not None:
        if isinstance(error, (OperationalError, InterfaceError)):
            return "sqlite3" not in type(error.orig).__module__ or "locked" in str(error.orig)
        if isinstance(error, (RequestException, ConnectionError)):
            return True
        if getattr(error, "error_code", "") in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"):  # MLflow's
            return True
        error = error.__cause__ or error.__context__
    return False


def last_outage_s() -> float:
    """Seconds since a store or server let this process wait."""
    return time.monotonic() - _last


def asked_again() -> Retrying:
    """What calls a function again while a store or server does not answer, for up to PATIENCE_S."""
    return Retrying(
        retry=retry_if_exception(is_outage),
        stop=stop_after_delay(PATIENCE_S),
        wait=wait_exponential(0.2, max=5.0),
        before_sleep=_waits,
        reraise=True,
    )


def patiently(function: Callable[P, T]) -> Callable[P, T]:
    """A function that is asked again; within another such function it is not, for that is as a whole."""

    def timed(*args: P.args, **kwargs: P.kwargs) -> T:
        global _last
        begun = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            if time.monotonic() - begun > SLOW_S:
                _last = time.monotonic()

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if getattr(_asking, "now", False):
            return function(*args, **kwargs)
        _asking.now = True
        try:
            return asked_again()(timed, *args, **kwargs)
        finally:
            _asking.now = False

    return call


def _waits(state: RetryCallState) -> None:
    global _last
    _last = time.monotonic()
    if state.attempt_number == 5:
        error = state.outcome.exception() if state.outcome else None
        while error is not None and error.__cause__ is not None:
            error = error.__cause__
        said = first_line(error) if isinstance(error, Exception) else ""
        report(f"a store does not answer, and is asked again for up to {PATIENCE_S / 60:.0f} minutes: {said}")
