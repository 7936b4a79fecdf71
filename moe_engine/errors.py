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


class StorageError(EngineError):
    """The disk refused: full, read-only, broken. What was saved before is untouched. Exit code 74 (EX_IOERR)."""

    exit_code = 74


class Preempted(EngineError):
    """The run was told to end and has saved its state; --resume auto goes on. Exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75
