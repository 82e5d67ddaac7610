"""The errors of the export."""

from fewstep.errors import UserError


class ExportError(UserError):
    """A student that stock diffusers cannot carry, or a folder that is no student: one line with the reason."""


class SchedulerCheckError(ExportError):
    """A scheduler that runs but does not do what the student was trained for; or it does not run."""


class NoRenoisingError(ExportError):
    """No stock scheduler draws new noise between the steps of such a student; without it there may be one."""
