"""Errors that reach the user as one line without a traceback, and SIGTERM as an exception."""

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager


class UserError(ValueError):
    """A mistake in what the user gave; the message says what, where, and how to fix it."""


class InvalidConfigError(UserError):
    """A config that no experiment can be made of; another one may be fine."""


class NonFiniteLossError(RuntimeError):
    """Training met a NaN or infinite loss; the message names the step."""


def refuse(*mistakes: tuple[object, str]) -> None:
    """Raise a UserError with the first message whose condition holds."""
    for wrong, message in mistakes:
        if wrong:
            raise UserError(message)


def report(error: Exception | str) -> None:
    """Print an error as one line on stderr, without secrets."""
    print(f"fffexp: {hide_password(' '.join(str(error).split()))}", file=sys.stderr)


def hide_password(text: str) -> str:
    """The text with *** for the password of each URL in it."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&](?:password|passwd|token)=)[^&\s]*", r"\1***", text)


_KEY = r'Parser key "([^"]+)":'
# what jsonargparse says besides the key and the causes
_NOISE = r"Expected a path but |Does not validate against|Subtypes: |Errors:|Given value|Expected a <class 'NoneType'>"
_REWRITTEN = {
    r"Type \S.*? expects a function or a callable class: ": "",
    r"\.? Got value: .*": "",
    r"Expected a dot import path string: (\S+)": r"no class \1 is known, nor can it be imported",
}


def one_line(message: str) -> str:
    """The key and the causes out of jsonargparse's messages, which list every type that it tried."""
    for pattern, text in _REWRITTEN.items():
        message = re.sub(pattern, text, message)
    keys = re.findall(_KEY, message)
    lines = [line.strip(" -\t") for line in re.sub(_KEY, "", message).splitlines()]
    causes = "; ".join(line for line in lines if line and not re.match(_NOISE, line)).replace(":;", ":")
    return f"{'.'.join(keys)}: {causes}" if keys else causes


@contextmanager
def handling(handler: Callable[[int, object], None], *numbers: signal.Signals) -> Iterator[None]:
    """Give these signals to a function; they go to the main thread, in which alone this does anything."""
    main = threading.current_thread() is threading.main_thread()
    with ExitStack() as stack:  # a signal may come between two of these
        for number in numbers if main else ():
            stack.callback(signal.signal, number, signal.getsignal(number) or signal.SIG_DFL)
            signal.signal(number, handler)
        yield


def terminated_by_signal() -> AbstractContextManager[None]:
    """Turn SIGTERM into SystemExit, so that runs are marked and the exit status is not 0."""
    return handling(lambda number, frame: sys.exit(128 + number), signal.SIGTERM)
