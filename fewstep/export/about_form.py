"""What a student's ``fewstep.json`` may look like: it comes from elsewhere, so its form is checked before its use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.reading import Kinds, misfit

_NONE = type(None)
#: The kinds of what there may be; all but the call is absent in a student of some version, or form.
_KINDS: Kinds = {
    "call": dict,
    "base_files": dict,
    "base_model": str,
    "component": str,
    "conditional": (str, _NONE),
    "config": dict,
    "counts": (list, _NONE),
    "gamma": (int, float),
    "guidable": bool,
    "guidance_range": (list, _NONE),
    "inputs": dict,
    "load": dict,
    "lora": dict,
    "part": dict,
    "pipeline": str,
    "prediction_type": str,
    "related": dict,
    "renoise": str,
    "scheduler": str,
    "students": list,
    "training": (dict, _NONE),
}
#: What a LoRA cannot be put onto its base without.
_OF_A_LORA: Kinds = {"base_model": str, "component": str}
_TOLD_OF_BASE = frozenset({"revision", "subfolder", "variant", "file"})


def why_misshapen(about: Any) -> str | None:
    """What of the content of a ``fewstep.json`` cannot be meant, in words; None where it can be used."""
    reason = misfit(about, _KINDS, optional=_KINDS.keys() - {"call"})
    if reason is not None:
        return reason
    if any(value is not None for value in about.get("load", {}).values()):
        # They are words of from_pretrained, and one of those would run code.
        return "its load names more than parts that are absent"
    if not _texts(about.get("inputs", {})):
        return "its inputs are no names with their forms"
    told = about.get("base_files", {})
    if told.keys() - _TOLD_OF_BASE or not _texts(told):
        return f"its base_files are other than {', '.join(sorted(_TOLD_OF_BASE))}"
    return _of_relatives(about.get("related", {})) or (_of_lora(about) if "lora" in about else None)


def _of_relatives(related: Mapping[str, Any]) -> str | None:
    for name, record in related.items():
        wanted: Kinds = {"task": str, "call": dict, "counts": dict, "why_not": str}
        right = isinstance(record, dict) and "why_not" not in record
        reason = misfit(record, wanted, optional=("why_not",) if right else ("call", "counts"))
        if reason is not None:
            return f"of its relative {name}: {reason}"
    return None


def _of_lora(about: Mapping[str, Any]) -> str | None:
    lora = about["lora"]
    reason = misfit(about, _OF_A_LORA) or misfit(lora, {"file": str, "further_files": dict}, ("further_files",))
    if reason is None and not _texts(lora.get("further_files", {})):
        return "its further_files are no names of files"
    return reason


def _texts(table: Mapping[str, Any]) -> bool:
    return all(isinstance(value, str) for value in table.values())
