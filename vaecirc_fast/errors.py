"""The errors a user can meet: each is one line that names the argument, what was given and what is expected."""


class InputError(ValueError):
    """A wrong argument, file or configuration. The command line exits with code 2 on it."""


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why and what would change it."""


class MissingExtra(ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class TrainingDiverged(RuntimeError):
    """The loss or the weights became NaN or infinite; the message names the step and the last good checkpoint."""


class AccelerationError(BackendError):
    """An accelerated module did not agree with its original and was restored; the message has the numbers."""


class RunFailed(RuntimeError):
    """A run's process ended before its run, or raised what is no error of this package; the message has its trace."""
