"""Errors that are told to the user in one line, without a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave; the message says what, where, and how to mend it."""


class NonFiniteLossError(RuntimeError):
    """Training met a NaN or infinite loss; the message names the step."""
