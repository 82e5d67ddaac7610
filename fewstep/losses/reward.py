"""Learning from a reward of finished pictures: rewards as a loss, and what of the samples' variety it may cost.

    reward feedback   L = mean relu(m - sum_i w_i r_i)     one margin, of the weighted sum (RTDMD's values: m = 3)
                      L = sum_i w_i mean relu(m_i - r_i)   one margin for each (Hyper-SD, arXiv 2404.13686, §3.3)
                      L = -mean sum_i w_i r_i              none

Added to distribution matching, which is KL(p_S || p_T), the last is KL(p_S || p_T exp(b r) / Z) but for a constant: the
teacher's law tilted by the reward (DMDR).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_reward(rewards: Tensor, weights: Sequence[float]) -> Tensor:
    """sum_i w_i r_i of each sample: ``rewards`` (B, n) and n ``weights`` -> (B,), float32 or wider."""
    rewards = rewards.float() if rewards.dtype.itemsize < 4 else rewards
    return rewards @ torch.tensor(weights, dtype=rewards.dtype, device=rewards.device)


def reward_loss(rewards: Tensor, weights: Sequence[float], margins: Sequence[float] = ()) -> Tensor:
    """The loss () by which samples are driven to higher rewards; see the module.

    Args:
        rewards: r, (B, n), with gradient.
        weights: w, n of them.
        margins: m: none; one, of the weighted sum; or n. A sample that is above its margin is left in peace.

    Raises:
        ValueError: another number of margins.
    """
    if not margins:
        return -weighted_reward(rewards, weights).mean()
    if len(margins) == 1:
        return F.relu(margins[0] - weighted_reward(rewards, weights)).mean()
    if len(margins) != rewards.shape[1]:
        raise ValueError(f"{rewards.shape[1]} rewards have one margin, as many, or none, not {len(margins)}")
    below = F.relu(torch.tensor(margins, dtype=rewards.dtype, device=rewards.device) - rewards)
    return weighted_reward(below, weights).mean()


def pair_distance(a: Tensor, b: Tensor) -> Tensor:
    """The root mean square distance (B,) of two samples of each condition, (B, ...) both: 0 where all are alike."""
    return (a - b).float().square().flatten(1).mean(1).sqrt()
