"""What numbers depend on beside the model: they are compared where this is the same, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.data.durable import json_sha256


def protocol(*, num: int, seed: int, conditions_sha256: str, **more: Any) -> dict[str, Any]:
    """A report's protocol, with its digest.

    Args:
        num: samples in every row.
        seed: that the samples' own seeds are made of.
        conditions_sha256: of the whole list of prompts or labels that the samples were asked for.
        more: whatever else numbers depend on, as JSON can hold it.
    """
    fields = {"num": num, "seed": seed, "conditions_sha256": conditions_sha256, **more}
    return {**fields, "digest": json_sha256(fields)}


def digest_of(content: Mapping[str, Any]) -> str:
    """The digest that a protocol has to have."""
    return json_sha256({name: value for name, value in content.items() if name != "digest"})
