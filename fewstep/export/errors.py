"""The one error of the export."""

from fewstep.errors import UserError


class ExportError(UserError):
    """A student that stock diffusers cannot carry, or a folder that is no student: one line with the reason."""
