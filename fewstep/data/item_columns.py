"""Which columns a row of items may have, and what each holds, as the pipeline's own signature says."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
from PIL import Image
from torch import Tensor

from fewstep.conditioning.item import PROMPT
from fewstep.data.image_folders import find_images
from fewstep.data.image_opening import Stored
from fewstep.data.item_pictures import SHOWN, Clip, Picture, as_meant, flat, is_mask, look_at
from fewstep.data.item_rows import Row
from fewstep.errors import UserError, one_line
from fewstep.recording.call.items import is_of_an_item
from fewstep.recording.call.pictures import picture_arguments
from fewstep.recording.call.plain import argument_hints, members

#: The column of the wanted result, which is no argument of the call.
TARGET = "target"
# The picture that a clip begins with, as diffusers' pipelines call it.
_FIRST = "image"
# What arranges its pictures otherwise (in rows of examples, one of them to be made) would be told another arrangement.
_PLAIN_LIST = "several pictures are one list of paths, and what arranges them in another way cannot be distilled"


class Columns:
    """The arguments of a pipeline's call that may be columns.

    Args:
        pipeline_class: whose call it is.
        call: the arguments that are the same for all items.
        pixels: look at those of every picture; those of results are looked at in any case.
    """

    def __init__(self, pipeline_class: type, call: Mapping[str, Any], pixels: bool = True) -> None:
        self.name, self.pixels = pipeline_class.__name__, pixels
        parameters = list(inspect.signature(pipeline_class.__call__).parameters.values())[1:]
        named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        hints = argument_hints(pipeline_class)
        self.hints = {one.name: hints[one.name] for one in named}
        self.pictures = [name for name in picture_arguments(pipeline_class) if name in self.hints]
        required = {one.name for one in named if one.default is inspect.Parameter.empty}
        #: What every item has to have.
        self.required = (required | ({PROMPT} & self.hints.keys())) - call.keys()

    def read(self, row: Row, folder: Path) -> dict[str, Any]:
        """A row's values, each of its pictures looked at; paths are relative to ``folder``.

        Raises:
            UserError: a column is none of an item's, a value none of its column's, or a picture cannot be read.
        """
        for column in row.values:
            self._refuse_no_column(row.name, column)
        values = {column: self._value(row.name, column, value, folder) for column, value in row.values.items()}
        target = values.get(TARGET)
        # A real clip to learn from has its own first frame.
        if TARGET not in self.hints and isinstance(target, list) and _FIRST in self.hints and _FIRST not in values:
            values[_FIRST] = target[0]
        if lacking := sorted(self.required - values.keys()):
            raise UserError(f"{row.name} has no {' and no '.join(lacking)}, and {self.name} needs it for every item")
        return values

    def _refuse_no_column(self, row: str, column: str) -> None:
        if column == TARGET and column not in self.hints:
            return
        if column not in self.hints:
            known = ", ".join(self.pictures) or "none"
            raise UserError(
                f"{row} has the column {column}, and {self.name} takes no such argument; those that it calls pictures "
                f"are: {known}"
            )
        if not is_of_an_item(column):
            raise UserError(f"{row}: {column} is the same for all items; leave the column out")

    def _value(self, row: str, column: str, value: Any, folder: Path) -> Any:
        if not self._is_picture(column, value):
            if column == PROMPT and not isinstance(value, str):
                raise UserError(f"{row}: its prompt is no text")
            each = list(flat(value))
            if any(isinstance(one, SHOWN) or hasattr(one, "read") for one in each):
                if None in each:
                    raise UserError(f"{row}: {column} has an empty place among its pictures; {_PLAIN_LIST}")
                raise UserError(f"{row}: {column} of {self.name} takes no picture")
            return value
        try:
            # No cache is made of results.
            pixels = self.pixels or (column == TARGET and column not in self.hints)
            shown = _picture(value, partial(look_at, grey=is_mask(column), pixels=pixels), folder)
        except UserError as error:
            raise UserError(f"{row}: {column}: {error}") from error
        kinds = [get_origin(kind) or kind for kind in members(self.hints.get(column, Any)) if kind is not type(None)]
        if isinstance(shown, list) and Image.Image in kinds and list not in kinds:
            raise UserError(f"{row}: {column} of {self.name} takes one picture, not a list or a folder of them")
        if not isinstance(shown, list | Tensor | np.ndarray) and set(kinds) == {list}:
            raise UserError(f"{row}: {column} of {self.name} takes a list of pictures, or a folder of frames")
        return shown

    def _is_picture(self, column: str, value: Any) -> bool:
        """Whether a value is meant as pictures: the argument takes some, or is given a text and takes nothing plain."""
        if column in self.pictures or (column == TARGET and column not in self.hints):
            return True
        each = list(flat(list(value) if isinstance(value, tuple) else value))
        if each and all(isinstance(one, str) for one in each):
            plain = mentions(self.hints[column], str, int, float, bool, dict)
            return not plain and not column.startswith((PROMPT, f"negative_{PROMPT}"))
        return bool(each) and all(isinstance(one, SHOWN) for one in each) and not mentions(self.hints[column], str)


def _picture(value: Any, look: partial[Picture], folder: Path) -> Any:
    """A picture, or a list of them, as it stands in a row, looked at.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, list | tuple):
        if not value:
            raise UserError("the list is empty")
        if any(isinstance(child, list | tuple) for child in value):
            raise UserError(f"it is a list of lists; {_PLAIN_LIST}")
        return [one for child in value for one in flat(_picture(child, look, folder))]
    if isinstance(value, str | Path):
        path = folder / value
        if not path.is_dir():
            return look(path)
        frames = find_images(path).files
        if not frames:
            raise UserError(f"the folder {path} holds no picture")
        return Clip(look(frame) for frame in frames)
    if isinstance(value, Image.Image):
        try:
            return as_meant(value, look.keywords["grey"])
        except ValueError as error:
            raise UserError(f"it cannot be used: {one_line(error)}") from error
    if isinstance(value, Tensor | np.ndarray):
        return value
    if not hasattr(value, "read"):
        raise UserError(f"a picture is a path or a list of paths, not {value!r}")
    stored: Stored = value
    return look(stored)


def mentions(hint: Any, *kinds: type) -> bool:
    """Whether a type is one of these, or has one as a part."""
    return hint in kinds or any(mentions(part, *kinds) for part in get_args(hint))
