"""What the user of a student gives in each call, where its samples are made of items: their arguments and forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fewstep.conditioning.item import holds_picture
from fewstep.recording.call.pictures import own_pictures

if TYPE_CHECKING:
    from fewstep.recording import Recording

#: How the arguments start that say what guidance leads away from, which a student does not heed.
NEGATIVES = ("negative_prompt",)


def about_inputs(recording: Recording) -> dict[str, Any]:
    """What ``fewstep.json`` says of a student's items: ``inputs``, and an ``example`` of what is no picture among them.

    Nothing for a student of prompts or labels.

    Args:
        recording: of its pipeline.
    """
    if recording.conditional != "item":
        return {}
    inputs = {name: form for name, form in recording.inputs.items() if not name.startswith(NEGATIVES)}
    own = recording.invocation.item.arguments
    return {"inputs": inputs, "example": {name: own[name] for name in inputs if not holds_picture(own[name])}}


def untrained_pictures(recording: Recording) -> list[str]:
    """The picture arguments of a student's pipeline that it was trained without."""
    return [name for name in own_pictures(type(recording.pipeline)) if name not in recording.inputs]
