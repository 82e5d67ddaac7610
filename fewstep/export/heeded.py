"""What of a call a student cannot heed: a negative prompt, a guidance or a picture that it was not trained at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.recording.call.numbers import SCALES

# The argument by which a network trained over a range of guidance is told it.
_TOLD = "guidance_scale"


def what_is_not_heeded(
    given: Mapping[str, Any], usual: Mapping[str, Any], guidance_range: Sequence[float] | None
) -> str | None:
    """The words of a warning, or None.

    Args:
        given: the arguments of the call.
        usual: those of a bare call: what ``fewstep.json`` fills in, and the class's defaults.
        guidance_range: the guidance scales that the network was told in training, None where it was told none.
    """
    scales = [name for name, value in given.items() if _is_other_scale(name, value, usual.get(name), guidance_range)]
    negatives = [name for name, value in given.items() if name.startswith("negative_prompt") and _says_something(value)]
    if not scales and not negatives:
        return None
    told = ", ".join([f"{name}={given[name]:g}" for name in scales] + negatives)
    trained = [f"{name}={usual[name]:g}" for name in scales if name != _TOLD or guidance_range is None]
    if guidance_range is not None:
        trained.append(f"{_TOLD} from {guidance_range[0]:g} to {guidance_range[1]:g}")
    alone = f" and was trained at {', '.join(trained)} alone" if trained else ""
    return f"this student has its guidance in its weights{alone}, so leave out {told}"


def what_is_untrained(
    given: Mapping[str, Any], pictures: Sequence[str], inputs: Mapping[str, str] | None = None
) -> str | None:
    """The words of a warning, or None.

    Args:
        given: the arguments of the call.
        pictures: the arguments by which the student's pipeline may be told a picture, and was not in training.
        inputs: those that it was told in every sample of its training, with their forms.
    """
    told = [name for name in pictures if given.get(name) is not None]
    if told:
        without = "these" if inputs else "pictures"
        return f"this student was trained without {without}, so what it makes of {', '.join(told)} is not known"
    missing = [name for name, form in (inputs or {}).items() if form != "text" and given.get(name) is None]
    if missing:
        return f"this student was trained with {', '.join(missing)}, so what it makes without is not known"
    return None


def _is_other_scale(name: str, value: Any, usual: Any, guidance_range: Sequence[float] | None) -> bool:
    """Whether an argument is a guidance that the student was not trained at."""
    if not name.endswith(SCALES) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in (value, usual)):
        return False
    if name == _TOLD and guidance_range is not None:
        return not guidance_range[0] <= value <= guidance_range[1]
    return bool(value != usual and not value <= usual <= 1)  # at 1 and below nothing is guided


def _says_something(value: Any) -> bool:
    """Whether a negative is more than nothing: neither None nor an empty text, nor a list of those."""
    if isinstance(value, list | tuple):
        return any(_says_something(one) for one in value)
    return value is not None and not (isinstance(value, str) and not value)
