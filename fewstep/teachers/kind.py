"""Which kind of diffusion a teacher is: flow matching, a table of alphas, or EDM; its scheduler alone is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import diffusers
from diffusers import SchedulerMixin

from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule, from_scheduler
from fewstep.errors import UserError, first_line
from fewstep.teachers.single_file import configuration_of, index_of
from fewstep.teachers.source import Source

Kind = Literal["flow", "table", "edm"]
#: As people call them.
IN_WORDS: dict[Kind, str] = {
    "flow": "a flow-matching teacher",
    "table": "a teacher with a table of alphas",
    "edm": "an EDM teacher",
}


def kind_of_scheduler(scheduler: Any) -> Kind:
    """The kind that a recording will find: both read it from what the scheduler has.

    Raises:
        ValueError: it is of none.
    """
    schedule, _ = from_scheduler(scheduler)
    kinds: dict[type, Kind] = {FlowSchedule: "flow", TableSchedule: "table", EDMSchedule: "edm"}
    if type(schedule) not in kinds:
        raise ValueError(f"{type(scheduler).__name__} is of a model of few steps already")
    return kinds[type(schedule)]


def scheduler_of(source: Source, teacher: str) -> Any:
    """A teacher's scheduler, from two small files: its index, and the scheduler's own; of a hub id they are fetched.

    Args:
        source: of the teacher.
        teacher: how messages call it.

    Raises:
        UserError: they cannot be read, or there is no scheduler of diffusers' own.
    """
    try:
        index = index_of(source)
        pairs = {part: entry[1] for part, entry in index.items() if isinstance(entry, list | tuple) and len(entry) == 2}
        classes = {part: getattr(diffusers, str(name), None) for part, name in pairs.items()}
        found: dict[str, Any] = {
            part: one for part, one in classes.items() if isinstance(one, type) and issubclass(one, SchedulerMixin)
        }
        if not found:
            raise ValueError("its index names no scheduler of diffusers")
        part = "scheduler" if "scheduler" in found else next(iter(found))
        place = configuration_of(Path(source.place)) if source.is_file else source.place
        on_hub = {"revision": source.revision} if isinstance(place, str) and source.revision is not None else {}
        return found[part].from_pretrained(place, subfolder=part, **on_hub)
    except UserError:
        raise
    except Exception as error:  # of the hub, of its client, of the connection, or of diffusers
        raise UserError(f"{teacher}: its scheduler cannot be opened: {first_line(error)}") from error
