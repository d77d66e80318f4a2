"""Errors that a user can fix. The command line prints them as one line and exits with 1."""


class MlxAlignError(Exception):
    """Base of all errors that a user can fix: the message says what is wrong, where, and how."""


class DataError(MlxAlignError):
    """A data file or row is malformed; the message names file and line."""


class SplitError(DataError):
    """Nothing can be held out: the data has fewer than two different prompts."""


class ConfigError(MlxAlignError):
    """An option or a configuration file is wrong; the message names the option."""


class ModelError(MlxAlignError):
    """A model or adapter folder can't be used; the message names the folder and the reason."""


class TrainingError(MlxAlignError):
    """Training had to stop: a non-finite loss or gradient, or a failing reward function.

    The message names the step and the rows, or the function, its line and the prompt.
    """


class RewardError(TrainingError):
    """A reward function or reward model failed, or its rewards can't be computed with."""


class WriteError(MlxAlignError):
    """A file can't be written (disk full, quota, permissions); the message names it.

    Files are replaced atomically: none is left half-written.
    """


class SelftestError(MlxAlignError):
    """A check of `mlx-align selftest` failed."""
