"""Errors a user can cause. Each carries one line that names the file, row or field and the remedy.

The command line prints the line and exits with status 2; from Python they are ordinary ``ValueError`` or
``RuntimeError``, so callers need not import this module to catch them.
"""


class UserError(Exception):
    """Base of every error that the user, not the program, has to mend."""


class ConfigError(UserError, ValueError):
    """A configuration field has an impossible value, or two fields contradict each other."""


class DataError(UserError, ValueError):
    """A data file or a column in it is missing, malformed or outside its allowed range."""


class CheckpointError(UserError, ValueError):
    """A checkpoint is missing, damaged or belongs to another configuration."""


class BackendError(UserError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message lists every reason."""
