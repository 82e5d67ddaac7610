"""The exceptions that are no bugs: the user can mend it, or wished it. Other exceptions' words, as they are quoted."""


class UserError(ValueError):
    """Bad input. The message is one line that says what to do; the command line exits with code 2 and no traceback."""


class Interrupted(Exception):  # noqa: N818 - a wish of the user, not an error
    """Ctrl-C or a termination signal was obeyed: the step was finished and a checkpoint written."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's words; its type's name where it has none."""
    return str(error).strip().split("\n")[0].strip() or type(error).__name__


def printable(text: str) -> str:
    """A text on one line, with the characters that would end it or steer a terminal as their escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text.strip())


def one_line(error: BaseException) -> str:
    """All of an exception's words on one line; its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def of_the_system(error: BaseException) -> bool:
    """Whether an exception is the system's own word about a file: no space, no permission. Others may be bugs.

    Libraries in Rust (safetensors, tokenizers) raise exceptions of their own, which quote it.
    """
    return error.errno is not None if isinstance(error, OSError) else "(os error " in str(error)
