"""The model card: what a person needs to sample the student with stock diffusers, and to trust it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.data.durable import write_text_durably
from fewstep.export.about import call_of
from fewstep.export.card.inputs import given, imports, inputs_section
from fewstep.export.card.lora import loaders, sections
from fewstep.export.card.related import related_section
from fewstep.export.card.sampling import generator_lines, impossible_counts, samplers, seeds, sizes
from fewstep.recording.pipeline import find_scheduler
from fewstep.teachers.names import UNNAMED

#: Stands in a card for the place that its student is loaded from.
PLACEHOLDER = '"path/to/this/folder"'


def write_card(
    about: Mapping[str, Any],
    pipeline: Any,
    *,
    license_fields: Mapping[str, str],
    metrics: Mapping[str, Any] | None,
    note: str,
) -> str:
    """The text of README.md.

    Args:
        about: the content of ``fewstep.json``.
        pipeline: the student's stock pipeline.
        license_fields: of the teacher, see :func:`teacher_license_of`.
        metrics: name -> number, or row name -> {name -> number}.
        note: how scheduler and renoise were decided.
    """
    steps, method, base = about["steps"], about["method"], about["base_model"]
    stock = type(pipeline).__name__
    parts = [
        _front_matter(about, pipeline, license_fields),
        f"# {base} in {_steps(steps)}",
        f"A {steps}-step student of `{base}`{_with_lora(about)}, distilled with {method} by fewstep. "
        f"It is {_form(about)} `{stock}`: diffusers alone loads and samples it.{_experts(about)}{_code(about)}",
        f"## Use it\n\n```python\n{snippet(about, pipeline)}\n```\n\n"
        "The arguments matter: without them a stock pipeline runs its own number of steps, and most guide. fewstep "
        "fills them in:\n\n"
        f"```python\n{_loading(about, pipeline)}\n"
        f"{_output(pipeline)[0]} = pipe({', '.join(given(about))}){_output(pipeline)[1]}\n```",
        "\n\n".join(
            filter(None, ["## Steps", _grids(about), impossible_counts(about, pipeline), samplers(about, pipeline)])
        ),
        f"## Seeds\n\n{seeds(about, pipeline)}",
        *sections(about, pipeline),
    ]
    if (inputs := inputs_section(about)) is not None:
        parts.append(inputs)
    if other_sizes := sizes(about):
        parts.append(f"## Other sizes\n\n{other_sizes}")
    if about["guidance_range"]:
        low, high = about["guidance_range"]
        parts.append(
            "## Guidance\n\nThe network is told the guidance, and is called once a step whatever it is: "
            f"`guidance_scale` may be anything from {low:g} to {high:g}, for which it was trained."
        )
    if about.get("guidable"):
        parts.append(
            "## Guidance\n\nThis student was distilled from its teacher without guidance, and keeps it: call it with "
            "`guidance_scale` (and a negative prompt) as the teacher is called, which doubles the cost of a step. The "
            "code above samples it without."
        )
    if told := about.get("untrained_pictures"):
        parts.append(
            f"## Pictures\n\n`{stock}` also takes {', '.join(f'`{name}`' for name in told)}. This student was trained "
            + (
                "without: what it makes of them is not known."
                if about["conditional"] == "item"
                else "from its prompts alone: what it makes of a picture is not known."
            )
        )
    if (section := related_section(about, PLACEHOLDER)) is not None:
        parts.append(section)
    if metrics:
        parts.append(f"## Numbers\n\n{_table(metrics)}")
    licensed = (
        "It has the teacher's licence." if license_fields else "The teacher's licence, unknown to fewstep, applies."
    )
    parts.append(f"## Made with\n\nScheduler: {note}. Prediction type: {about['prediction_type']}. {licensed}")
    return "\n\n".join(parts) + "\n"


def write_numbers(folder: Path, rows: Mapping[str, Mapping[str, Any]], note: str) -> None:
    """Put an evaluation's numbers on a student's card, in the place of older ones.

    Args:
        folder: the student's, with its README.md.
        rows: row label -> {name -> number}.
        note: how they were measured, a sentence or more.
    """
    path = folder / "README.md"
    text = re.sub(r"## Numbers\n.*?(?=\n## |\Z)", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    # Before the last heading of a card as it was written; an edited one may have lost that, and its head stays first.
    place = text.rfind("## Made with")
    before, after = (text, "") if place < 0 else (text[:place], text[place:])
    numbers = f"## Numbers\n\n{_table(rows)}\n\n{note}\n\n"
    write_text_durably(path, f"{before.rstrip()}\n\n{numbers}{after}".rstrip() + "\n")


def snippet(about: Mapping[str, Any], pipeline: Any) -> str:
    """Stock diffusers code that samples the student right."""
    name, pick = _output(pipeline)
    asked = given(about)
    call = call_of(type(pipeline), about)
    arguments = asked + [f"{key}={value!r}" for key, value in call.items()]
    lora = "lora" in about
    loads, *fetch = _stock(about, pipeline)
    used = ", ".join(sorted([loads.partition(" = ")[2].partition(".")[0], *([about["scheduler"]] if lora else [])]))
    lines = ["import torch", f"from diffusers import {used}", *imports(asked), *fetch, "", loads]
    if about["noise_follows"] == "global seed":
        lines = ["import functools", "", *lines]
    if lora:
        lines += loaders(about, pipeline, PLACEHOLDER)
        source = f'{PLACEHOLDER}, subfolder="scheduler"'
        lines.append(f"pipe.{find_scheduler(pipeline)} = {about['scheduler']}.from_pretrained({source})")
    lines += generator_lines(about, pipeline)
    arguments.append("generator=generator")
    lines += [f"{name} = pipe(", *(f"    {argument}," for argument in arguments), f"){pick}"]
    return "\n".join(lines)


def _with_lora(about: Mapping[str, Any]) -> str:
    if "teacher_lora" not in about:
        return ""
    kept = ", both in one file" if "lora" in about else ""
    return f" with the LoRA `{about['teacher_lora']}`{kept}"


def _experts(about: Mapping[str, Any]) -> str:
    """Which of several networks is called when."""
    if "experts" not in about:
        return ""
    parts = []
    for name, expert in about["experts"].items():
        lowest = expert["lowest_timestep"]
        place = "below" if lowest is None else f"from timestep {lowest:g} up"
        parts.append(f"`{name}` {place}" + ("" if expert["trained"] else " (the teacher's own: no step leads there)"))
    return f" Its networks share the time: {', '.join(parts)}."


def _code(about: Mapping[str, Any]) -> str:
    """What code it brings along."""
    if "code" not in about:
        return ""
    told = (
        "How it moves between its steps is computed"
        if about["renoise"] == "tcd"
        else "Which of its students a request goes to is decided"
        if "students" in about
        else "Which network is called when is decided"
        if "experts" in about
        else "Where each step ends is told its network"
    )
    return f" {told} by `{about['code']}` in its folder, hence `trust_remote_code`."


def _form(about: Mapping[str, Any]) -> str:
    if "code" in about:
        return "a"
    return "a LoRA for a stock" if "lora" in about else "a stock"


def _stock(about: Mapping[str, Any], pipeline: Any) -> list[str]:
    """The line that loads the pipeline, and what else it imports."""
    absent = "".join(f", {name}=None" for name in about["load"])
    if "code" in about:
        absent += ", trust_remote_code=True"
    if "lora" not in about:
        return [f"pipe = DiffusionPipeline.from_pretrained({PLACEHOLDER}{absent})"]
    told = about.get("base_files", {})
    if "file" in told:
        return [f"pipe = {type(pipeline).__name__}.from_single_file({json.dumps(told['file'])}{absent})"]
    revision, variant = (
        f", {name}={json.dumps(told[name])}" if name in told else "" for name in ("revision", "variant")
    )
    base, inside = about["base_model"], told.get("subfolder")
    if inside is None or "/" not in base:
        source = json.dumps(base if inside is None else f"{base}/{inside}")
        return [f"pipe = DiffusionPipeline.from_pretrained({source}{revision}{variant}{absent})"]
    # A pipeline has no subfolder for from_pretrained, so that folder of the repository is fetched first.
    fetched = f'snapshot_download({json.dumps(base)}{revision}, allow_patterns="{inside}/*") + "/{inside}"'
    load = f"pipe = DiffusionPipeline.from_pretrained({fetched}{variant}{absent})"
    return [load, "from huggingface_hub import snapshot_download"]


def _loading(about: Mapping[str, Any], pipeline: Any) -> str:
    needs = imports(given(about))
    if "lora" not in about:
        return "\n".join(["import fewstep", *needs, "", f"pipe = fewstep.load({PLACEHOLDER})"])
    loads, *fetch = _stock(about, pipeline)
    base = loads.removeprefix("pipe = ")
    first = "\n".join(["import fewstep", f"from diffusers import {base.partition('.')[0]}", *needs, *fetch])
    return f"{first}\n\npipe = fewstep.apply({base}, {PLACEHOLDER})"


def pipeline_tag(about: Mapping[str, Any], pipeline: Any) -> str:
    """The hub's word for what the pipeline does."""
    kind = "video" if _is_video(pipeline) else "image"
    source = {"prompt": f"text-to-{kind}", "item": f"image-to-{kind}"}
    return source.get(about["conditional"], f"unconditional-{kind}-generation")


def _front_matter(about: Mapping[str, Any], pipeline: Any, license_fields: Mapping[str, str]) -> str:
    lora = "lora" in about
    fields: dict[str, Any] = {
        # What is no model's name would be a broken link on the hub.
        **({"base_model": about["base_model"]} if about["base_model"] != UNNAMED else {}),
        **({"base_model_relation": "adapter"} if lora else {}),
        **license_fields,
        "library_name": "diffusers",
        "pipeline_tag": pipeline_tag(about, pipeline),
        "tags": ["fewstep", "few-step", "distillation", *["lora"] * lora, about["method"]],
    }
    # JSON is YAML, and it quotes what needs quoting.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _is_video(pipeline: Any) -> bool:
    return "num_frames" in inspect.signature(type(pipeline).__call__).parameters


def _output(pipeline: Any) -> tuple[str, str]:
    return ("video", ".frames[0]") if _is_video(pipeline) else ("image", ".images[0]")


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _grids(about: Mapping[str, Any]) -> str:
    rows = ["| `num_inference_steps` | times t (1 is noise) | |", "| --- | --- | --- |"]
    trained = {round(t, 4) for t in about["grid"]}
    for count, grid in about["grids"].items():
        times = ", ".join(f"{t:.4g}" for t in grid)
        if int(count) == about["steps"]:
            remark = "trained"
        elif about["trained_at_every_count"] or all(round(t, 4) in trained for t in grid):
            remark = "only times it was trained at"
        else:
            remark = "runs right, but visits times it was not trained at"
        rows.append(f"| {count} | {times} | {remark} |")
    rows.append("")
    rows.append(
        "These are the counts at which the scheduler was seen to do what the student was trained for. Other counts are "
        "wrong or were not tried."
    )
    return "\n".join(rows)


def _table(metrics: Mapping[str, Any]) -> str:
    rows = metrics if all(isinstance(value, Mapping) for value in metrics.values()) else {"student": metrics}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"| | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    lines += [f"| {label} | {' | '.join(_number(row.get(name)) for name in names)} |" for label, row in rows.items()]
    return "\n".join(lines)


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
