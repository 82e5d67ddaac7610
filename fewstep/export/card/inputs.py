"""What the card's code gives a student beside noise: a prompt, a label, or an item with its pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# Of a list of pictures: more are the frames of a clip.
_LISTED = 4
# Items of several sizes name each.
_PICTURE = re.compile(r"picture (\w+) \d+x\d+( or .*)?")


def given(about: Mapping[str, Any]) -> list[str]:
    """The arguments of the card's call, as code, that say what is asked for."""
    example = about.get("example")
    if about["conditional"] == "item":
        return [f"{name}={_value(name, form, example or {})}" for name, form in about["inputs"].items()]
    if about["conditional"] == "prompt":
        return [json.dumps("a photo of a cat" if example is None else example, ensure_ascii=False)]
    return [] if about["conditional"] is None else [f"class_labels=[{example or 0}]"]


def imports(arguments: list[str]) -> list[str]:
    """The lines that import what these arguments use."""
    names = [name for name in ("load_image", "load_video") if any(f"{name}(" in argument for argument in arguments)]
    return [f"from diffusers.utils import {', '.join(names)}"] if names else []


def inputs_section(about: Mapping[str, Any]) -> str | None:
    """What the student is given in each call; None for one of prompts or labels."""
    if about["conditional"] != "item":
        return None
    rows = ["| argument | seen in training as |", "| --- | --- |"]
    rows += [f"| `{name}` | {form} |" for name, form in about["inputs"].items()]
    remark = (
        "The student was trained with these in every sample, and what it makes without one is not known. Pictures go "
        "in as they are: the pipeline alone resizes them."
    )
    if about["call"].get("strength") == 1.0:
        remark += " `strength` stays 1: below it the pipeline leaves out the first steps, and the student needs all."
    return "\n".join(["## Inputs", "", *rows, "", remark])


def _value(name: str, form: str, example: Mapping[str, Any]) -> str:
    """An argument of an item as code, by its form (:func:`fewstep.conditioning.item.form`)."""
    if name in example:
        return json.dumps(example[name], ensure_ascii=False) if isinstance(example[name], str) else repr(example[name])
    if (picture := _PICTURE.fullmatch(form)) is not None:
        return _loaded(f"{name}.png", picture[1])
    if (several := re.fullmatch(r"list of (\d+): .*?picture (\w+) .*", form)) is not None:
        count = int(several[1])
        if count > _LISTED:
            return f'load_video("{name}.mp4")'
        return f"[{', '.join(_loaded(f'{name}_{number}.png', several[2]) for number in range(1, count + 1))}]"
    shape = re.search(r"\[[\d, ]*\]", form)
    numbers = f"torch.rand({shape[0] if shape is not None else '[]'})"
    numbers += ".numpy()" if "array" in form else ""
    return f"[{numbers}]" if form.startswith("list") else numbers


def _loaded(file: str, mode: str) -> str:
    # A picture is loaded as RGB.
    return f'load_image("{file}")' + ("" if mode == "RGB" else f'.convert("{mode}")')
