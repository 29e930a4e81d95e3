"""The kinds of mistake a user can make, each with its own name.

Every message says what was expected, what came, where, and what to do. Our own bugs are `assert`s, not these.
"""


class InfctxError(Exception):
    """Something the user can put right. The command line prints the message without a traceback and exits with 2."""


class RecipeError(InfctxError):
    """A recipe key or value that cannot be honoured."""


class DataError(InfctxError):
    """A file or row that cannot be turned into documents."""


class CheckpointError(InfctxError):
    """A model file, run folder or export that cannot be read or written."""
