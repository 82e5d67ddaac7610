"""Numbers that are not finite, and which part of a pipeline makes them: to NaN, nothing that is compared is equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.recording.errors import RecordingError
from fewstep.recording.pipeline import find_scheduler, is_plain, modules_of
from fewstep.recording.watch.observation import NetworkCall, Step


def refuse_unfinite_step(pipeline: Any, step: Step, result: bool) -> None:
    """Raise where a step's answer is not finite, or with `result` the next sample, and name who made it so.

    Args:
        pipeline: that makes the step.
        step: just made.
        result: look at the next sample too; a stubbed network's answers may lead anywhere.

    Raises:
        RecordingError: it names the component and the timestep.
    """
    answered = _finite(step.model_output)
    if answered and not (result and step.result is not None and not _finite(step.result)):
        return
    kind, at = type(pipeline).__name__, f"at timestep {step.timestep:g}"
    scheduler = getattr(pipeline, find_scheduler(pipeline))
    if not answered:
        if not _finite(step.sample):
            raise RecordingError(f"{type(scheduler).__name__} of {kind} gave a sample that is not finite {at}")
        # The first step also holds the calls before it, such as those of text encoders.
        _refuse_call(pipeline, step.calls, at)
        raise RecordingError(f"{kind} makes NaN of its networks' finite answers {at}; mend its call")
    raise RecordingError(
        f"{type(scheduler).__name__} of {kind} makes a sample that is not finite of a finite answer "
        f"{at}{_why_scheduler(scheduler, step.timestep)}"
    )


def refuse_unfinite_conditioning(pipeline: Any, calls: Sequence[NetworkCall], arguments: Mapping[str, Any]) -> None:
    """Raise where a network is told NaN, before it is called, and name who said it.

    An infinity is no mistake there: additive masks have some.

    Args:
        pipeline: that was run up to its network.
        calls: so far; the last is that of the network.
        arguments: of the pipeline's call.

    Raises:
        RecordingError: it names the component and the prompt.
    """
    if any(bool(value.isnan().any()) for value in floats(calls[-1].arguments)):
        subject = next((f" for {arguments[name]!r}" for name in ("prompt", "class_labels") if name in arguments), "")
        _refuse_call(pipeline, calls[:-1], f"before the first step{subject}")
        raise RecordingError(
            f"{type(pipeline).__name__} tells its {calls[-1].component} NaN before the first step{subject}"
        )


def refuse_unfinite_images(pipeline: Any, component: str, images: Tensor, where: str) -> None:
    """Raise where what an autoencoder made is not finite."""
    if not _finite(images):
        raise RecordingError(_said(pipeline, component, where))


def is_finite(answer: Any) -> bool:
    """Whether all numbers of an answer are finite, in nested containers too."""
    return all(_finite(value) for value in floats(answer))


def _refuse_call(pipeline: Any, calls: Sequence[NetworkCall], where: str) -> None:
    """Raise for the first of these calls whose answer is not finite."""
    for call in calls:
        if not (call.finite and is_finite(call.output)):
            raise RecordingError(_said(pipeline, call.component, where))


def _said(pipeline: Any, component: str, where: str) -> str:
    why = _why_module(modules_of(pipeline)[component])
    return f"the {component} of {type(pipeline).__name__} answers with NaN or infinity {where}: {why}"


def _why_module(module: nn.Module) -> str:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        plain = not isinstance(tensor, nn.Parameter) or is_plain(tensor)
        # An infinite buffer is no mistake: attention masks are such.
        if (
            plain
            and tensor.is_floating_point()
            and bool(tensor.isnan().any() or (_weight(tensor) and not _finite(tensor)))
        ):
            return f"its {name} is not finite; load weights that are"
    if any(tensor.dtype == torch.float16 for _, tensor in tensors):
        return "its weights are finite, but float16 ends at 65504; load it in float32 or bfloat16"
    return "its weights are finite, so it is what it was told, or its numbers overflow"


def _why_scheduler(scheduler: Any, timestep: float) -> str:
    table = getattr(scheduler, "alphas_cumprod", None)
    entry = round(timestep)
    at_noise = isinstance(table, Tensor) and 0 <= entry < len(table) and float(table[entry]) == 0
    if at_noise and scheduler.config.get("prediction_type") == "epsilon":
        return (
            ": its network predicts noise, and there its input is nothing but noise (zero terminal SNR), which says "
            "nothing of the sample; such a teacher predicts v (prediction_type in its scheduler_config.json), or "
            "starts lower (timestep_spacing leading)"
        )
    return "; try another scheduler of its family"


def _weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for child in value.values() for tensor in floats(child)]
    if isinstance(value, list | tuple):
        return [tensor for child in value for tensor in floats(child)]
    return []
