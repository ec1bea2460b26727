"""Stores and servers that do not answer for a while: they are asked again, for minutes, and nothing is lost."""

import functools
import os
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from requests import RequestException
from sqlalchemy.exc import InterfaceError, OperationalError
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from fffexp.errors import report
from fffexp.files import first_line

PATIENCE_S = float(os.environ.get("FFFEXP_PATIENCE_S") or 600)
HURRY_S = 60.0
APART_S = 120.0  # more than a call takes until it fails
SLOW_S = 5.0  # a call that takes longer has waited for somebody's lock
P = ParamSpec("P")
T = TypeVar("T")

_asking = threading.local()
_last = _hurried = float("-inf")


def is_outage(error: BaseException | None) -> bool:
    """Whether an error says that a store or server does not answer, or is locked; any other would come again."""
    chain: list[BaseException] = []
    while isinstance(error, Exception) and error not in chain:  # Ctrl-C in the middle of an outage is Ctrl-C
        chain.append(error)
        error = error.__cause__ or error.__context__
    for each in chain:
        if isinstance(each, (OperationalError, InterfaceError)):
            return "sqlite3" not in type(each.orig).__module__ or "locked" in str(each.orig)
    for each in chain:
        if isinstance(each, RequestException):
            return each.response is None or each.response.status_code >= 500 or each.response.status_code == 429
    # MLflow's, from a server
    return any(getattr(e, "error_code", "") in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED") for e in chain)


def last_outage_s() -> float:
    """Seconds since a store or server let this process wait."""
    return time.monotonic() - _last


def hurry() -> None:
    """Ask nothing again for a minute: this process was asked to stop."""
    global _hurried
    _hurried = time.monotonic() + HURRY_S


def asked_again() -> Retrying:
    """What calls a function again while a store or server does not answer, for up to PATIENCE_S.

    A call that fails after it went well for a while begins another outage.
    """
    first = last = float("-inf")

    def stop(_: RetryCallState) -> bool:
        nonlocal first, last
        now = time.monotonic()
        first, last = (now if now - last > APART_S else first), now
        return now - first > PATIENCE_S or now < _hurried

    wait = wait_exponential(0.2, max=5.0)
    return Retrying(retry=retry_if_exception(is_outage), stop=stop, wait=wait, before_sleep=_waits, reraise=True)


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
