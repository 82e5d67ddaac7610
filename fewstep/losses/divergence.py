"""f-distill's weights: other divergences than the reverse KL, from the density ratio that a discriminator knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

#: h(rho) = rho^2 f''(rho) of each f-divergence, rho = p_real / p_fake (Xu et al. 2025, f-distill, Table 1).
DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda rho: rho,
    "js": lambda rho: rho / (1 + rho),
    "sf": lambda rho: 1 / (1 + rho),
    "sh": torch.sqrt,
    "neyman": lambda rho: 1 / rho,
    "jf": lambda rho: 1 + rho,
}


class DivergenceWeight(nn.Module):
    """The factor (B,) on each sample's distribution-matching gradient, with mean 1 over the batch.

    rho = exp(logit), clamped twice; divided by its running mean among samples of like time where there are ``bins``;
    then h(rho) over the batch's mean of h. Reverse KL is the plain gradient (but for ``eps``), and so is any divergence
    where all logits are equal.

    Args:
        divergence: a name of :data:`DIVERGENCES`.
        bins: number of equal bins of the time; 0 for no normalisation by time.
        momentum: what a bin keeps of its old value where the batch has samples in it.
        t_min: lower end of the first bin.
        t_max: upper end of the last bin.
        logit_clamp: logits are clamped to +- this.
        ratio_min: lower bound of rho.
        ratio_max: upper bound of rho.
        bin_start: value of a bin that no sample was in yet.
        bin_eps: added to a bin's value and its count.
        eps: added to the batch's mean of h.

    Raises:
        KeyError: there is no such divergence.
    """

    bins: Tensor | None

    def __init__(
        self,
        divergence: str,
        bins: int = 0,
        momentum: float = 0.0,
        *,
        t_min: float = 0.0,
        t_max: float = 1.0,
        logit_clamp: float = 10.0,
        ratio_min: float = 0.1,
        ratio_max: float = 20.0,
        bin_start: float = 1.0,
        bin_eps: float = 1e-6,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.h = DIVERGENCES[divergence]
        self.momentum, self.bin_eps, self.eps = momentum, bin_eps, eps
        self.logit_clamp, self.ratio_min, self.ratio_max = logit_clamp, ratio_min, ratio_max
        # A buffer, so that it is kept in checkpoints; one that is None is not.
        self.register_buffer("bins", torch.full((bins,), bin_start, dtype=torch.float64) if bins else None)
        self.t_min, self.t_max = t_min, t_max

    @torch.no_grad()
    def forward(self, logits: Tensor, t: Tensor, total: Callable[[Iterable[Tensor]], None] | None = None) -> Tensor:
        """Weights float64 (B,); the bins learn from the same logits.

        Args:
            logits: (B,), or (B, heads), whose mean is taken.
            t: (B,) of the noised samples that the logits are of.
            total: sums tensors over processes in place, so that all of them share one mean.
        """
        logits = logits.double().reshape(len(logits), -1).mean(1)
        rho = logits.clamp(-self.logit_clamp, self.logit_clamp).exp().clamp(self.ratio_min, self.ratio_max)
        if self.bins is not None:
            rho = rho / (self._updated(self.bins, rho, t, total) + self.bin_eps)
        h = self.h(rho)
        sums = torch.stack([h.sum(), torch.ones_like(h).sum()])
        if total is not None:
            total([sums])
        return h / (sums[0] / sums[1] + self.eps)

    def _updated(
        self, bins: Tensor, rho: Tensor, t: Tensor, total: Callable[[Iterable[Tensor]], None] | None
    ) -> Tensor:
        """Each sample's bin (B,), after the bins have seen ``rho`` (B,)."""
        place = ((t.double() - self.t_min) / (self.t_max - self.t_min) * len(bins)).floor().long()
        place = place.clamp(0, len(bins) - 1)
        sums = torch.zeros(2, len(bins), dtype=torch.float64, device=rho.device)
        sums.index_add_(1, place, torch.stack([rho, torch.ones_like(rho)]))
        if total is not None:
            total([sums])
        mean = sums[0] / (sums[1] + self.bin_eps)
        bins.copy_(torch.where(sums[1] > 0, torch.lerp(mean, bins, self.momentum), bins))
        return bins[place]
