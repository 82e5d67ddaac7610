"""How varied the samples of one class are, beside real images."""

import torch
from torch import Tensor

from fewstep.eval.features import Reference


def within_class_spread(features: Tensor, labels: Tensor) -> float:
    """Mean squared distance between two different samples of the same class, averaged over classes.

    For n samples it equals 2 / (n - 1) sum |f - mean|², so no pair is formed. Classes of one sample are left out.
    Raises ValueError when no class has two samples.
    """
    spreads = []
    for label in labels.unique():
        group = features[labels == label].double()
        if len(group) > 1:
            spreads.append(2 * group.var(dim=0, correction=1).sum())
    if not spreads:
        raise ValueError("no class has two samples; generate more")
    return torch.stack(spreads).mean().item()


def diversity(features: Tensor, labels: Tensor, reference: Reference) -> float:
    """`within_class_spread` divided by the reference's own: 1 is as varied as real images, 0 is full collapse."""
    if reference.features is None or reference.labels is None:
        raise ValueError(f"the classes of {reference.name} are not known")
    return within_class_spread(features, labels) / within_class_spread(reference.features, reference.labels)
