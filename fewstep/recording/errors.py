"""The one error of the recorder."""

from fewstep.errors import UserError


class RecordingError(UserError):
    """A pipeline that cannot be recorded: one line that says what was seen and what to do."""
