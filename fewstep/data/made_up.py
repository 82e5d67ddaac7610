"""Items that nobody gave: two with made-up pictures, so that a pipeline which needs some can be looked at bare.

They are functions of a seed: smooth colours, and a white rectangle for a mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, get_origin

import numpy as np
import torch
from PIL import Image

from fewstep.conditioning.item import PROMPT, Item
from fewstep.data.item_columns import mentions
from fewstep.data.item_pictures import is_mask
from fewstep.recording.call.pictures import is_encoded, own_pictures
from fewstep.recording.call.plain import argument_hints, members
from fewstep.recording.pipeline import find_decoder, modules_of

_PROMPTS = ("a photo", "a painting of the sea")
_KINDS = (Image.Image, np.ndarray, torch.Tensor, torch.FloatTensor)
_SIDE = 64  # pixels, where a pipeline does not say its size
_FRAMES = 9  # of a clip, likewise


def made_up_items(pipeline: Any, call: Mapping[str, Any]) -> Iterator[list[Item]]:
    """Two items for a pipeline, with as few of its picture arguments as may be; then with one more, and so on.

    The first have the arguments that its call requires, or the first that it takes.

    Args:
        pipeline: a diffusers pipeline.
        call: keyword arguments of its call.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    hints = argument_hints(type(pipeline))
    own = [name for name in own_pictures(type(pipeline)) if name not in call and not is_encoded(name)]
    names = [name for name in own if mentions(hints[name], *_KINDS)]
    required = [name for name in names if parameters[name].default is inspect.Parameter.empty]
    for count in range(max(1, len(required)), len(names) + 1):
        chosen = [*required, *(name for name in names if name not in required)][:count]
        yield [_item(number, chosen, pipeline, call) for number in range(len(_PROMPTS))]


def made_up_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """RGB, smooth, so that an encoder sees structure."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def made_up_mask(seed: int, size: tuple[int, int]) -> Image.Image:
    """L: a white rectangle, half as wide and as high, on black."""
    width, height = size
    draws = np.random.default_rng(seed)
    left, top = int(draws.integers(0, width // 2 + 1)), int(draws.integers(0, height // 2 + 1))
    pixels = np.zeros((height, width), np.uint8)
    pixels[top : top + max(1, height // 2), left : left + max(1, width // 2)] = 255
    return Image.fromarray(pixels)


def _item(number: int, names: list[str], pipeline: Any, call: Mapping[str, Any]) -> Item:
    hints = argument_hints(type(pipeline))
    size = _size(pipeline, call)
    arguments: dict[str, Any] = {}
    if PROMPT in hints and PROMPT not in call:
        arguments[PROMPT] = _PROMPTS[number]
    for place, name in enumerate(names):
        make = made_up_mask if is_mask(name) else made_up_picture
        kinds = {get_origin(kind) or kind for kind in members(hints[name])} - {type(None)}
        count = _number(pipeline, call, "num_frames") or _FRAMES
        seeds = [1000 * number + 100 * place + frame for frame in range(count)]
        arguments[name] = [make(seed, size) for seed in seeds] if kinds == {list} else make(seeds[0], size)
    return Item(arguments, f"made-up item {number + 1}")


def _size(pipeline: Any, call: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height: the call's, else the pipeline's own."""
    # An autoencoder's is that of pictures.
    networks = [module for name, module in modules_of(pipeline).items() if name != find_decoder(pipeline)]
    configs = [config for one in networks if isinstance(config := getattr(one, "config", None), Mapping)]
    told = [getattr(pipeline, "default_sample_size", None), *(config.get("sample_size") for config in configs)]
    sample = next((size for size in told if isinstance(size, int)), None)
    side = _SIDE if sample is None else sample * getattr(pipeline, "vae_scale_factor", 1)
    width, height = _number(pipeline, call, "width"), _number(pipeline, call, "height")
    return width or side, height or side


def _number(pipeline: Any, call: Mapping[str, Any], name: str) -> int | None:
    """What a call says, or the pipeline's own default."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get(name)
    value = call.get(name, None if parameter is None else parameter.default)
    return value if isinstance(value, int) else None
