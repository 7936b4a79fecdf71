"""Errors a user can cause, each with the exit code that a launcher returns for it.

A message says what was found, what was expected and what to do. ValueError is for a caller's mistake, assert for ours;
neither belongs here.
"""


class EngineError(Exception):
    """Base of the errors that end a run with one clear message and `exit_code`, without a traceback."""

    exit_code = 70


class ConfigError(EngineError):
    """What the user wrote cannot work: a wrong key, value, layout or path. Exit code 78 (EX_CONFIG)."""

    exit_code = 78


class DataError(EngineError):
    """What the user's files hold cannot be used: bad rows, no text, ids out of range. Exit code 65 (EX_DATAERR)."""

    exit_code = 65
