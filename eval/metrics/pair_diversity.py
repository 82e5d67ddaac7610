"""How different the samples of one prompt or label are from each other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.eval.metrics.uncertainty import jackknife_error, standard_error


def pair_diversity(features: Tensor, groups: Tensor) -> tuple[float, float]:
    """Mean cosine distance between two samples of one prompt, averaged over prompts, with its standard error.

        D = mean over prompts of mean_{i<j} (1 - cos(f_i, f_j))

    0 is full collapse. Phased DMD (arXiv 2510.27684) compares students by the cosine itself, of DINO's features. Read
    it beside the teacher's own: its scale depends on prompts and network. The error is that over prompts; of a single
    prompt that of its samples (jackknife). Prompts of one sample are left out.

    Args:
        features: (N, d), float, none zero. groups: int (N,), equal for samples of one prompt.

    Raises:
        ValueError: no prompt has two samples, or a feature is zero.
    """
    units = F.normalize(features.double(), dim=1)
    if (units.norm(dim=1) < 0.5).any():
        raise ValueError("a feature of length zero has no direction")
    sets = [units[groups == group] for group in groups.unique()]
    sets = [rows for rows in sets if len(rows) > 1]
    if not sets:
        raise ValueError("no prompt has two samples; generate more")
    values = torch.stack([_mean_distance(rows) for rows in sets])
    if len(sets) > 1:
        return values.mean().item(), standard_error(values)
    rows = sets[0]
    error = jackknife_error(lambda kept: _mean_distance(rows[kept]), len(rows)) if len(rows) > 2 else float("nan")
    return values.mean().item(), error


def _mean_distance(rows: Tensor) -> Tensor:
    """1 - the mean cosine of two different rows (n, d) of length one: |sum|² has every pair twice and each row once."""
    num = len(rows)
    return 1 - (rows.sum(0).square().sum() - num) / (num * (num - 1))
