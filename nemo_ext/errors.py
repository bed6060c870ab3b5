"""Errors meant for people: one line, no stack trace, and the exit code that goes with it."""


class UserError(Exception):
    """Bad input: what is wrong, where, and what to do, in one line. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """A run that started and failed (a dead rank, a full disk, a loss that is not a number). Exit code 1."""

    exit_code = 1
