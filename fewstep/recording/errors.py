"""The one error of the recorder."""

from fewstep.errors import UserError

#: What is to be done about a pipeline that no argument of its call makes recordable.
ANOTHER = "take another teacher (docs/pipelines.md has tested ones, and fewstep probe tells of any)"


class RecordingError(UserError):
    """A pipeline that cannot be recorded: one line that says what was seen and what to do."""
