"""How much samples vary, student beside teacher: the numbers by which constant and over-saturated samples are known."""

from __future__ import annotations

from torch import Tensor


def spread(x0: Tensor) -> dict[str, float]:
    """How samples (N, ...) of at least two vary, in units of the network's space.

    Returns:
        ``std`` over everything; ``within``: over the places of one sample, each channel by itself, 0 for one colour;
        ``between``: over the samples at one place, 0 where all are alike.
    """
    x0 = x0.double().cpu()
    if x0.dim() > 3:  # (N, C, H, W), (N, C, F, H, W)
        within = x0.flatten(2).std(2).mean()
    elif x0.dim() == 3:  # tokens (N, P, C) or sound (N, C, T): what is constant does not vary along one of them
        within = min(x0.std(1).mean(), x0.std(2).mean())
    else:
        within = x0.std(1).mean()
    return {"std": x0.std().item(), "within": within.item(), "between": x0.std(0).mean().item()}


def beside(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """For the log: the spread of both's samples (N, ...) of the same noise, and their root mean square distance."""
    both = {"student": spread(student), "teacher": spread(teacher)}
    log = {f"samples/{who}_{what}": value for who, values in both.items() for what, value in values.items()}
    return log | {"samples/apart": (student - teacher).double().square().mean().sqrt().item()}
