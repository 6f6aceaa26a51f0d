"""What can go wrong by somebody else's hand, and the exit code that says so.

Each of these reaches the user as one message without a traceback: what, where, what is allowed,
what to do. Anything else that escapes is a bug of ours (exit 1, with its traceback).
"""


class UserError(ValueError):
    """Base of the errors a user can mend; `code` is the process's exit code."""

    code = 2


class ConfigError(UserError):
    """The config file or the command line (exit 2)."""

    code = 2


class DataError(UserError):
    """A source, a tokenizer or a token shard (exit 3)."""

    code = 3


class CheckpointError(UserError):
    """A checkpoint or a run directory (exit 4)."""

    code = 4


class NumericsError(UserError):
    """Non-finite numbers, or a merge that broke an invariant (exit 5)."""

    code = 5


class LostRankError(UserError):
    """Another rank is gone, or did not answer in time (exit 6)."""

    code = 6


PREEMPTED = 75  # exit code of a run that stopped on a signal and can go on
