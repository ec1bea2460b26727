"""Errors that reach the user as one line without a traceback, and SIGTERM as an exception."""

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in what the user gave; the message says what, where, and how to fix it."""


class InvalidConfigError(UserError):
    """A config that no experiment can be made of; another one may be fine."""


class NonFiniteLossError(RuntimeError):
    """Training met a NaN or infinite loss; the message names the step."""


def report(error: Exception | str) -> None:
    """Print an error as one line on stderr, without secrets."""
    print(f"fffexp: {hide_password(' '.join(str(error).split()))}", file=sys.stderr)


def hide_password(text: str) -> str:
    """The text with *** for the password of each URL in it."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&](?:password|passwd|token)=)[^&\s]*", r"\1***", text)


# what jsonargparse says besides the key and the cause
_NOISE = re.compile(
    r"Expected a path but |Does not validate against|Subtypes: |Errors:|Given value|Expected a <class 'NoneType'>"
)


def one_line(message: str) -> str:
    """The key and the causes out of jsonargparse's messages, which list every type that it tried."""
    message = re.sub(r"Type \S.*? expects a function or a callable class: ", "", message)
    message = re.sub(r"\.? Got value: .*", "", message)
    message = re.sub(
        r"Expected a dot import path string: (\S+)", r"no class \1 is known, nor can it be imported", message
    )
    keys = re.findall(r'Parser key "([^"]+)":', message)
    message = re.sub(r'Parser key "[^"]+":', "", message)
    lines = [line.strip(" -\t") for line in message.splitlines()]
    causes = [line for line in lines if line and not _NOISE.match(line)]
    causes_in_one = "; ".join(causes).replace(":;", ":")
    return f"{'.'.join(keys)}: {causes_in_one}" if keys else causes_in_one


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
