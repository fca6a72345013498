"""The errors that users meet. Each is a `TrlExtError` and also the standard error of its kind.

A message says what was wrong, the value got, the values allowed, and the next step.
"""


class TrlExtError(Exception):
    """Base of every error that trl_ext raises on purpose."""


class ConfigError(TrlExtError, ValueError):
    """A recipe or a config field is wrong; the message lists every finding, with file and line."""


class UnknownNameError(TrlExtError, LookupError):
    """A trainer, reward, dataset, model or recipe name that nothing registers."""


class PluginError(TrlExtError, ImportError):
    """A registered name exists, but what it points to cannot be loaded."""


class MissingDependencyError(TrlExtError, ImportError):
    """An optional package is missing; the message names the install command."""


class DataError(TrlExtError, ValueError):
    """A dataset cannot be read, or lacks what the trainer needs."""


class RewardError(TrlExtError, RuntimeError):
    """A reward function raised, or returned something that is not one number a completion."""


class RunError(TrlExtError, RuntimeError):
    """A run cannot go on or be saved: its checkpoint is unusable, its disk full."""


class OutOfMemoryError(RunError):
    """A run takes more memory than there is; the message names the phase and what would help.

    Attributes:
        phase: load, generate, reward, score, train or save.
    """

    def __init__(self, message: str, phase: str = "load"):
        super().__init__(message)
        self.phase = phase
