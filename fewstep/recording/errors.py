"""The one error of the recorder."""


class RecordingError(ValueError):
    """A pipeline that cannot be recorded: one line that says what was seen and what to do."""
