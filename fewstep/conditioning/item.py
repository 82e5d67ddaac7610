"""An item: what one sample is conditioned on, a prompt (or none) and a pipeline's own picture arguments.

Which argument is a picture is told by its value and never by its name: pipelines call theirs `image`, `control_image`,
`last_image`, `video`, `mask_image`, and anything else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

#: The argument of a pipeline's call that holds the text of a sample.
PROMPT = "prompt"

#: Of each argument, by its name: of pictures their sizes, of texts None, of anything else its value.
Form = tuple[tuple[str, Any], ...]


class Size(NamedTuple):
    """Of a picture, in pixels."""

    width: int
    height: int


@dataclass(frozen=True, eq=False)
class Item:
    """The arguments of a pipeline's call that are one sample's own.

    Two items are equal where their keys are.

    Attributes:
        arguments: under the pipeline's own names: the prompt where it takes one, pictures (PIL images, tensors, arrays,
            lists of these), and what else is given for each sample (negative_prompt, height, width, ...).
        name: for messages, such as "row 3 of items.jsonl".
        key: SHA-256 of what it holds, as hexadecimal text; "" stands for that of `arguments`.
        form: what it has alike with others of its form (:func:`form_of`); () stands for that of `arguments`.
    """

    arguments: Mapping[str, Any]
    name: str = ""
    key: str = ""
    form: Form = ()

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", digest(self.arguments))
        if not self.form:
            object.__setattr__(self, "form", form_of(self.arguments))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Item) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        """Its name, or its prompt, for messages."""
        return self.name or (repr(self.subject) if self.subject is not None else f"item {self.key[:8]}")

    @property
    def subject(self) -> str | None:
        """Its prompt; None where it has none."""
        prompt = self.arguments.get(PROMPT)
        return prompt if isinstance(prompt, str) else None

    @property
    def pictures(self) -> dict[str, Any]:
        """Its arguments that are pictures."""
        return {name: value for name, value in self.arguments.items() if holds_picture(value)}

    @property
    def forms(self) -> dict[str, str]:
        """What each of its arguments is, in words."""
        return {name: form(value) for name, value in self.arguments.items()}


def holds_picture(value: Any) -> bool:
    """Whether a value is a picture, a tensor or an array, or a list of such."""
    if isinstance(value, list | tuple):
        return any(holds_picture(child) for child in value)
    return isinstance(value, PIL.Image.Image | Tensor | np.ndarray)


def form(value: Any) -> str:
    """What an argument of an item is, in words: "picture RGB 64x48", "list of 2: picture RGB 64x48, ...", "text"."""
    if isinstance(value, PIL.Image.Image):
        return f"picture {value.mode} {value.width}x{value.height}"
    if isinstance(value, Tensor | np.ndarray):
        return f"{'tensor' if isinstance(value, Tensor) else 'array'} {list(value.shape)}"
    if isinstance(value, list | tuple):
        different = list(dict.fromkeys(form(child) for child in value))
        return f"list of {len(value)}: {', '.join(different)}"
    return "text" if isinstance(value, str) else type(value).__name__


def form_of(arguments: Mapping[str, Any]) -> Form:
    """What items of one form have alike: the sizes and numbers of their pictures, and all that is no text."""
    return tuple((name, _formed(arguments[name])) for name in sorted(arguments))


def size_of(shown: Any) -> Size:
    """The size of a picture, a tensor (..., H, W), or an array (H, W), (H, W, C) or (C, H, W)."""
    if isinstance(shown, np.ndarray) and shown.ndim > 2 and shown.shape[-1] in (1, 3, 4):
        return Size(shown.shape[-2], shown.shape[-3])
    if isinstance(shown, Tensor | np.ndarray):
        return Size(shown.shape[-1], shown.shape[-2])
    return Size(*shown.size)


def _formed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_formed(child) for child in value)
    if isinstance(value, Tensor | np.ndarray) and value.ndim < 2:
        return tuple(value.shape)
    if isinstance(value, Tensor | np.ndarray) or isinstance(getattr(value, "size", None), tuple):
        return size_of(value)  # also of what opens a picture when it is asked for
    if isinstance(value, Mapping):
        return form_of(value)
    return None if isinstance(value, str) else value


def digest(arguments: Mapping[str, Any]) -> str:
    """SHA-256 of the arguments of an item, whatever their order, as hexadecimal text.

    Raises:
        TypeError: a value is none that an item may hold.
    """
    sha = hashlib.sha256()
    for name in sorted(arguments):
        sha.update(f"{name}=".encode())
        _add(sha, arguments[name])
    return sha.hexdigest()


def _add(sha: hashlib._Hash, value: Any) -> None:
    """Add one value, its type and its length first, so that no two values read alike."""
    if isinstance(value, PIL.Image.Image):
        sha.update(f"picture {value.mode} {value.size};".encode() + value.tobytes())
    elif isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        sha.update(f"tensor {plain.dtype} {list(plain.shape)};".encode())
        sha.update(plain.flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        sha.update(f"array {value.dtype} {value.shape};".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        sha.update(f"dict {len(value)};".encode() + digest(value).encode())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        sha.update(f"list {len(value)};".encode())
        for child in value:
            _add(sha, child)
    elif value is None or isinstance(value, str | bool | int | float):
        text = repr(value).encode()
        sha.update(f"{type(value).__name__} {len(text)};".encode() + text)
    else:
        raise TypeError(f"an item holds texts, numbers and pictures, not {type(value).__name__}")
