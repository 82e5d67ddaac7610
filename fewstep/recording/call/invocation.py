"""How to call a pipeline: which argument carries the prompts or labels, and which keyword arguments stay fixed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fewstep.conditioning.item import Form, Item, holds_picture
from fewstep.recording.call.items import check_items, with_other_pictures
from fewstep.recording.call.numbers import SCALES, refuse_impossible
from fewstep.recording.call.pictures import refuse_pictures
from fewstep.recording.call.plain import plain_call
from fewstep.recording.errors import ANOTHER, RecordingError

# The arguments that name the samples of a call, in diffusers' own words, and what is recorded when none is given.
_SUBJECTS: dict[str, tuple[Literal["prompt", "label"], Any]] = {
    "prompt": ("prompt", "a photo"),
    "class_labels": ("label", 0),
}
#: The same by what they hold.
SUBJECT_ARGUMENTS = {kind: argument for argument, (kind, _) in _SUBJECTS.items()}
# The caller's business, not the recipe's: what is sampled, how it is returned, and how it is watched.
_IGNORED = ("generator", "num_inference_steps", "output_type", "return_dict")


@dataclass
class Invocation:
    """A pipeline's call with everything fixed but the prompts, labels or items.

    Attributes:
        conditional: "prompt", "label", "item" (a prompt or none, and pictures) or None (an unconditional pipeline).
        call: the fixed keyword arguments, those of prompts, labels and items apart, as JSON gives them back.
        item: the prompt, label or item that the recording itself uses.
        parameters: the names that the pipeline's `__call__` takes, with their defaults (`inspect._empty`: required).
        steps: the teacher's own step count: the caller's, else the pipeline's default; None where neither says one.
        other: an item with other pictures than `item`; None: the pipeline is not conditioned on items.
    """

    conditional: str | None
    call: dict[str, Any]
    item: Any
    parameters: dict[str, Any] = field(repr=False)
    steps: int | None = None
    other: Any = None

    def arguments(self, items: list[Any], steps: int, seed: int = 0, **changes: Any) -> dict[str, Any]:
        """The keyword arguments that sample `items` (B of them; unconditional: only their number counts).

        Args:
            items: prompts, labels or items.
            steps: how many the pipeline makes.
            seed: of the generator that the pipeline is given where it takes one.
            changes: to the call.

        Raises:
            RecordingError: items that differ in what one call has once.
        """
        batch = len(items)
        own = _joined(items) if self.conditional == "item" else {}
        arguments = {**self.call, **own, **changes, "num_inference_steps": steps}
        # Pipelines demand that a negative prompt is a list where the prompt is one, and a string where it is a string.
        if batch > 1:
            for name, value in arguments.items():
                if isinstance(value, str) and name.startswith(("negative_prompt", "prompt")):
                    arguments[name] = [value] * batch
        if self.conditional == "prompt":
            arguments["prompt"] = items[0] if batch == 1 else list(items)
        elif self.conditional == "label":
            arguments["class_labels"] = list(items)
        elif self.conditional is None and "batch_size" in self.parameters:
            arguments["batch_size"] = batch
        if "generator" in self.parameters:
            arguments["generator"] = torch.Generator().manual_seed(seed)
        if "output_type" in self.parameters:
            arguments["output_type"] = "pt"
        return arguments

    def size_key(self, item: Item) -> Form:
        """What decides of an item how large its samples are: a height and a width where it has them, else its form."""
        own = dict(item.form)
        sides = [(side, own.get(side) or self.default(side)) for side in ("height", "width")]
        if any(not isinstance(value, int) for _, value in sides):
            return item.form
        # Pictures are brought to what the call says, and their number may still be that of the frames.
        return (*sides, *((name, value) for name, value in item.form if isinstance(value, int | float)))

    def default(self, name: str) -> Any:
        """The value that argument `name` has in a plain call: the caller's, else the pipeline's default."""
        value = self.call.get(name, self.parameters.get(name))
        return None if value is inspect.Parameter.empty else value


def _joined(items: Sequence[Item]) -> dict[str, Any]:
    """The arguments of items in one call: their own of one; of several a list where they are texts or pictures."""
    if len(items) == 1:
        return dict(items[0].arguments)
    joined: dict[str, Any] = {}
    for name, first in items[0].arguments.items():
        values = [item.arguments.get(name) for item in items]
        if isinstance(first, str) or holds_picture(first):
            joined[name] = values
        elif any(value != first for value in values):
            raise RecordingError(f"the items of one call have several values of {name}: {values}")
        else:
            joined[name] = first
    return joined


def condition_kind(pipeline_class: type) -> Literal["prompt", "label"] | None:
    """What a pipeline class is conditioned on, as its call says; None where that names neither prompts nor labels."""
    parameters = inspect.signature(pipeline_class.__call__).parameters
    return next((kind for kind, argument in SUBJECT_ARGUMENTS.items() if argument in parameters), None)


def read_invocation(pipeline: Any, call: dict[str, Any], items: Sequence[Item] | None = None) -> Invocation:
    """Sort the caller's keyword arguments.

    Args:
        pipeline: a diffusers pipeline.
        call: keyword arguments of its call.
        items: what samples are conditioned on, where that holds pictures; None: prompts, labels or nothing.

    Raises:
        RecordingError: an argument the pipeline does not take, or one that cannot be part of a recipe.
    """
    name = type(pipeline).__name__
    signature = inspect.signature(type(pipeline).__call__)
    parameters = {key: p.default for key, p in list(signature.parameters.items())[1:]}
    unknown = sorted(set(call) - set(parameters))
    if unknown:
        raise RecordingError(f"{name} takes no argument {', '.join(unknown)}; remove it from the call")
    for key in ("timesteps", "sigmas", "latents"):
        if call.get(key) is not None:
            raise RecordingError(f"the recorder chooses {key} itself; remove {key} from the call of {name}")
    for key in [key for key in call if key.endswith(SCALES)]:
        if call[key] is None:
            call = {name: value for name, value in call.items() if name != key}  # as if it had not been given
        elif isinstance(call[key], bool) or not isinstance(call[key], int | float):
            raise RecordingError(f"{key} of {name} is a number, not {call[key]!r}; mend the call")
    for key, value in call.items():
        if key.endswith("_per_prompt") and value not in (None, 1):
            raise RecordingError(f"the recorder samples once per prompt; remove {key} from the call of {name}")
    if "num_inference_steps" not in parameters:
        raise RecordingError(f"{name} takes no num_inference_steps, so it has no steps to distil: {ANOTHER}")
    rest = {
        key: value
        for key, value in call.items()
        if key not in (*_IGNORED, *_SUBJECTS, "batch_size") and not key.startswith("callback")
    }
    steps = call.get("num_inference_steps") or parameters["num_inference_steps"]
    steps = steps if isinstance(steps, int) else None
    if items is None:
        refuse_pictures(pipeline, rest)
    else:
        check_items(type(pipeline), items, call)
    rest = plain_call(type(pipeline), rest)
    asked = call.get("num_inference_steps")
    refuse_impossible(type(pipeline), rest if asked is None else {**rest, "num_inference_steps": asked})
    if items is not None:
        return Invocation("item", rest, items[0], parameters, steps, with_other_pictures(items))
    for argument, (conditional, stand_in) in _SUBJECTS.items():
        if argument in parameters:
            item = call.get(argument)
            if isinstance(item, list | tuple):
                item = item[0] if item else None
            return Invocation(conditional, rest, stand_in if item is None else item, parameters, steps)
    return Invocation(None, rest, None, parameters, steps)
