"""The attention backends that a run can be told, by diffusers' names."""

from __future__ import annotations

from fewstep.errors import UserError

#: Leaves the networks as they are.
AUTO = "auto"


def known_backends() -> tuple[str, ...]:
    """What can be asked for. Backends whose code comes from the hub are left out: it would be run."""
    from diffusers.models.attention_dispatch import AttentionBackendName  # takes seconds, and is seldom wanted

    return AUTO, *sorted(one.value for one in AttentionBackendName if not one.value.endswith("_hub"))


def refuse_unknown_backend(backend: str) -> None:
    """Raise where diffusers knows no such backend.

    Raises:
        UserError: it says which there are.
    """
    if backend != AUTO and backend not in known_backends():
        raise UserError(f"--attention_backend must be one of {', '.join(known_backends())}, not {backend!r}")
