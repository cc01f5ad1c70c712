"""Errors in three parts: what came, why it can't work, what to try.

Every error that a reader can cause is a `CourseError`. It prints as

    ShapeError: 32 query heads cannot share 5 key/value heads (32 is not a multiple of 5).
      Grouped-query attention gives each key/value head the same number of query heads.
      Try n_kv_heads = 4 or 8, or n_heads = 30.

The command line prints the same text and exits with `exit_code`, without a traceback.
"""


class CourseError(Exception):
    """Base of all errors that tell the reader what to do next."""

    exit_code = 1

    def __init__(self, what: str, why: str, fix: str) -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(f"{what}\n  {why}\n  Try {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        """Errors travel between processes: an exception is otherwise rebuilt from its text alone."""
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[CourseError], args: tuple[str, ...], state: dict[str, object]) -> CourseError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class ShapeError(CourseError, ValueError):
    """Tensors whose shapes do not fit together."""


class GraphError(CourseError, RuntimeError):
    """A gradient that the recorded graph cannot give: freed, overwritten or never recorded."""


class DeviceError(CourseError, RuntimeError):
    """A device or number format that this machine does not have."""


class AssetError(CourseError, OSError):
    """A model or text file that is missing, truncated or altered."""


class NetworkError(CourseError, OSError):
    """Nothing could be fetched."""


class DiskError(CourseError, OSError):
    """No room, or no permission, to write."""


class ModelError(CourseError, ValueError):
    """A model folder or file that cannot be read as one of the supported families."""


class UnknownNameError(CourseError, LookupError):
    """A notebook, model, benchmark or chapter that does not exist."""


class PortError(CourseError, OSError):
    """A port that another program holds."""


class NotebookError(CourseError, RuntimeError):
    """A notebook that failed, or is not in the form that the course keeps."""


class MissingPackageError(CourseError, ImportError):
    """A part of the course that needs an optional package."""


class SandboxError(CourseError, RuntimeError):
    """Submissions cannot be run in isolation on this machine."""
