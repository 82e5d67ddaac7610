"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """Bad input. The message is one line that says what to do; the command line exits with code 2 and no traceback."""
