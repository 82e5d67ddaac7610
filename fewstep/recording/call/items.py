"""The items of a recording: two with different pictures at least, all with arguments that a pipeline's call takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.conditioning.item import PROMPT, Item, holds_picture
from fewstep.recording.call.numbers import SCALES
from fewstep.recording.errors import RecordingError

# What is the recorder's, the whole run's or the caller's business, and no item's.
_OF_ALL = frozenset(
    {"batch_size", "generator", "latents", "num_inference_steps", "output_type", "return_dict", "sigmas", "timesteps"}
)


def is_of_an_item(argument: str) -> bool:
    """Whether an argument of a pipeline's call may be one sample's own."""
    return not (argument in _OF_ALL or argument.startswith("callback") or argument.endswith((*SCALES, "_per_prompt")))


def as_items(items: Sequence[Item | Mapping[str, Any]]) -> list[Item]:
    """Items from items or from their arguments, each with a name for messages.

    Raises:
        RecordingError: one is neither, or holds what no item may.
    """
    if isinstance(items, Mapping | str) or not isinstance(items, Sequence):
        raise RecordingError('items are a list, such as [{"prompt": "a cat", "image": picture}, ...]')
    found = []
    for number, item in enumerate(items):
        name = f"item {number}"
        if isinstance(item, Item):
            found.append(item)
        elif isinstance(item, Mapping):
            try:
                found.append(Item(dict(item), name))
            except TypeError as error:
                raise RecordingError(f"{name}: {error}") from error
        else:
            raise RecordingError(f"{name} is a {type(item).__name__}; give its arguments as a dict")
    return found


def check_items(pipeline_class: type, items: Sequence[Item], call: Mapping[str, Any]) -> None:
    """Every item has the same arguments, and the pipeline's call takes them and lacks none.

    Raises:
        RecordingError: it says which item, and what is wrong with it.
    """
    if not items:
        raise RecordingError("no items were given; two with different pictures are needed")
    name, first = pipeline_class.__name__, items[0]
    parameters = inspect.signature(pipeline_class.__call__).parameters
    for item in items:
        unknown = sorted(set(item.arguments) - set(parameters))
        if unknown:
            raise RecordingError(f"{item}: {name} takes no argument {', '.join(unknown)}; leave it out of the items")
        shared = sorted(argument for argument in item.arguments if not is_of_an_item(argument))
        if shared:
            raise RecordingError(f"{item}: {', '.join(shared)} is the same for all items; leave it out of them")
        odd = sorted(item.arguments.keys() ^ first.arguments.keys())
        if odd:
            raise RecordingError(f"{item} and {first} differ in which arguments they have ({', '.join(odd)})")
        if not item.pictures:
            raise RecordingError(f"{item} holds no picture; what needs none is recorded with prompts")
    twice = sorted(set(first.arguments) & set(call))
    if twice:
        raise RecordingError(f"{', '.join(twice)} of {name} is given by the items and by the call; give it once")
    pictured = [key for key, value in call.items() if holds_picture(value)]
    if pictured:
        raise RecordingError(
            f"the call of {name} holds a picture ({', '.join(pictured)}); pictures belong to the items"
        )
    if call.get(PROMPT) is not None:
        raise RecordingError(f"the call of {name} holds a prompt; every item has its own")
    required = [key for key, p in list(parameters.items())[1:] if p.default is p.empty and p.kind < p.VAR_KEYWORD]
    wanting = [key for key in required if key not in first.arguments and key not in call]
    if wanting:
        raise RecordingError(f"{first} lacks {', '.join(wanting)}, which {name} needs; give every item its own")


def with_other_pictures(items: Sequence[Item]) -> Item:
    """The first item whose pictures are not those of the first one, of their forms where there is such.

    Raises:
        RecordingError: all have the same.
    """
    first = items[0]
    others = [item for item in items[1:] if Item(item.pictures) != Item(first.pictures)]
    alike = [item for item in others if item.forms == first.forms]
    if not others:
        raise RecordingError(
            "no two items differ in their pictures, so what follows a picture cannot be told from what is the same for "
            "all; give two items with different pictures"
        )
    return (alike or others)[0]


def with_pictures_of(item: Item, other: Item) -> Item:
    """An item with the pictures of another and everything else its own."""
    return Item({**item.arguments, **other.pictures}, f"{item} with the pictures of {other}")
