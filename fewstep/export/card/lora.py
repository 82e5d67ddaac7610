"""What the card of a LoRA student says besides: how it is loaded, together with other LoRAs, and in other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.export.apply import lora_files
from fewstep.export.lora_names import READERS
from fewstep.export.student_adapter import ADAPTER


def loaders(about: Mapping[str, Any], pipeline: Any, place: str) -> list[str]:
    """The stock calls that load a student's adapters, one for each network that it is for.

    Args:
        about: the content of ``fewstep.json``.
        pipeline: the student's stock pipeline.
        place: where its folder lies, as code.
    """
    lines = []
    for name, file in lora_files(about).items():
        words = f"weight_name={file!r}, adapter_name={ADAPTER!r}"
        if name == about["component"] and hasattr(pipeline, "load_lora_weights"):
            lines.append(f"pipe.load_lora_weights({place}, {words})")
        else:
            lines.append(f'pipe.{name}.load_lora_adapter({place}, prefix="{about["component"]}", {words})')
    return lines


def sections(about: Mapping[str, Any], pipeline: Any) -> list[str]:
    """The card's sections of a LoRA student; of another student none."""
    if "lora" not in about:
        return []
    found = [f"## With other LoRAs\n\n{_with_others(about, pipeline)}"]
    if (programs := _programs(about)) is not None:
        found.append(f"## In other programs\n\n{programs}")
    return found


def _with_others(about: Mapping[str, Any], pipeline: Any) -> str:
    target = "pipe" if hasattr(pipeline, "set_adapters") else f"pipe.{about['component']}"
    load = "load_lora_weights" if target == "pipe" else "load_lora_adapter"
    return (
        f"The student's adapter is named `{ADAPTER}`. To load another one switches it off; name both, and how strong "
        "each is:\n\n"
        f'```python\n{target}.{load}("path/to/style.safetensors", adapter_name="style")\n'
        f'{target}.set_adapters(["{ADAPTER}", "style"], [1.0, 0.8])\n```\n\n'
        "Leave it an adapter on a quantised base: nothing can be fused into such weights. Where the pipeline's own "
        "loader fails on them (Flux' does on those of optimum-quanto), the network's loads it: "
        f'`pipe.{about["component"]}.load_lora_adapter(..., prefix="{about["component"]}")`.'
    )


def _programs(about: Mapping[str, Any]) -> str | None:
    readers = READERS.get(about["lora"]["network"], {})
    if not readers:
        return None
    rows = ["| program | file |", "| --- | --- |"]
    for program, names in readers.items():
        first = about["component"]
        files = lora_files(about) if names is None else {n: names.file_of(n, first) for n in lora_files(about)}
        rows.append(f"| {program} | {', '.join(f'`{file}`' for file in files.values())} |")
    return "\n".join(
        [
            *rows,
            "",
            "Each program's rule for names finds all layers in its file; the programs themselves were not run for this "
            "student. Alpha is the rank in every file, so that a strength of 1 is what was trained.",
            "",
            sampling_elsewhere(about),
        ]
    )


def sampling_elsewhere(about: Mapping[str, Any]) -> str:
    """With which settings of ComfyUI and stable-diffusion.cpp a student visits the times that it was trained at."""
    shift = simple_schedule(about["timesteps"], about["prediction_type"])
    if shift is None:
        return (
            "No schedule of ComfyUI or stable-diffusion.cpp is known to visit this student's times: there it is "
            "sampled at times that it was not trained at."
        )
    sampler = "lcm" if about["renoise"] == "fresh" else "euler"
    shifted = f", flow shift {shift:g}" if about["prediction_type"] == "flow" else ""
    return (
        f"In ComfyUI and stable-diffusion.cpp: sampler `{sampler}`, schedule `simple`, {about['steps']} steps, "
        f"cfg 1{shifted}. Their other schedules, the default ones too, visit times that it was not trained at."
    )


def simple_schedule(timesteps: Sequence[float], prediction_type: str) -> float | None:
    """The flow shift with which the schedule called "simple" gives these timesteps; 1 for other teachers.

    Of n steps it visits the entries 999 - floor(k 1000 / n), k = 0 ... n - 1, of a table of 1,000 times: timesteps of a
    diffusion's table, or u = 1 - floor(k 1000 / n) / 1000 of a flow, shifted to s u / (1 + (s - 1) u).

    Args:
        timesteps: that the student visits, in [0, 1000].
        prediction_type: of its network.

    Returns:
        The shift s > 0, or None where "simple" visits other times.
    """
    offsets = [int(k * 1000 / len(timesteps)) for k in range(len(timesteps))]
    if prediction_type in ("epsilon", "v_prediction", "sample"):
        same = all(abs(t - (999 - offset)) < 0.5 for t, offset in zip(timesteps, offsets, strict=True))
        return 1.0 if same else None
    if prediction_type != "flow":
        return None
    visited = [t / 1000 for t in timesteps]
    plain = [1 - offset / 1000 for offset in offsets]
    if len(visited) == 1 or not 0 < visited[1] < 1:
        return 1.0 if len(visited) == 1 and abs(visited[0] - 1) < 1e-6 else None
    shift = round(visited[1] * (1 - plain[1]) / (plain[1] * (1 - visited[1])), 4)
    shifted = [shift * u / (1 + (shift - 1) * u) for u in plain]
    return shift if all(abs(a - b) < 5e-4 for a, b in zip(visited, shifted, strict=True)) else None
