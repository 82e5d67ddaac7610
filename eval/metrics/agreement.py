"""Whether samples show what was asked for."""

from torch import Tensor


def agreement(logits: Tensor, labels: Tensor) -> float:
    """Share of samples that the classifier takes for the class asked for; logits (N, classes), labels (N,)."""
    return (logits.argmax(1) == labels.to(logits.device)).double().mean().item()
