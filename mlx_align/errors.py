"""Mistakes a user can mend. The command line prints one as a single line and exits with 1."""


class MlxAlignError(Exception):
    """Base of every error that is the user's to mend: its text says what, where and how."""


class DataError(MlxAlignError):
    """A data file or row is not what was expected; the text names file and line."""


class ConfigError(MlxAlignError):
    """An option or a configuration file is wrong; the text names the option."""


class ModelError(MlxAlignError):
    """A model or adapter folder can't be used; the text names the folder and what is amiss."""


class TrainingError(MlxAlignError):
    """Training had to stop (non-finite loss or gradient); the text names the step and the rows.

    So it had to where a reward function failed: the text names it, its line and the prompt.
    """


class WriteError(MlxAlignError):
    """A file can't be written (disk full, quota, rights); the text names it. Nothing is torn."""
