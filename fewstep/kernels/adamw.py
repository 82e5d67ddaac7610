"""The update of one role: clip, AdamW (Loshchilov & Hutter 2019, Algorithm 2), and the averages that follow the role.

For a gradient g with the clip factor c, and the k-th update of a parameter p with the momenta m and v::

    g <- c g,   m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    p <- (1 - lr wd) p - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)
    e <- e + w (p - e)            for every average e

Where ``skip`` says so on the device, k, m, v and p stay as they are; averages move all the same. The host reads
nothing. The paper decays weights by wd alone; torch and this, by lr wd.

The closed form is torch's fused AdamW between a foreach product and a foreach lerp, and bit for bit what these three
give over the whole lists. On a CPU it goes by blocks of parameters that fit into a cache, so that memory is passed over
once. AdamW's own ``grad_scale`` would spare the product, but not the bits: it divides. The Triton form is one launch
over all tensors, by a table of their addresses: a launch for each would keep the host busy for longer than the whole
update keeps a GPU. Parameters that are divided over processes come as the parts that lie here, no DTensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.kernels.dispatch import choose, triton_runs_on
from fewstep.kernels.updates import Common, Follower, Moments, Row, Rule

#: Elements of a block on a CPU: five float32 tensors of so many are 2.6 MB.
BLOCK = 2**17


@torch.no_grad()
def adamw(
    moments: Moments,
    gradients: Sequence[Tensor | None],
    rule: Rule,
    *,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    followers: Sequence[Follower] = (),
) -> None:
    """One update of the parameters that have a gradient, in place; averages follow the others, too.

    Args:
        moments: the parameters, and what is kept of them.
        gradients: one for each parameter, of its shape, dtype and device; they are changed.
        rule: of the update.
        scale: c, () float32; None for 1.
        skip: () float32, 1.0 where nothing is to be updated, else 0.0; None for 0.0.
        followers: the averages.
    """
    weights = tuple(follower.weight for follower in followers)
    for rows, counts in moments.rows(gradients, followers):
        device = counts.device
        skipped = torch.zeros((), device=device) if skip is None else skip.to(device)
        updated = [row.count for row in rows if row.gradient is not None]
        if len(updated) == len(rows):
            counts.add_(1 - skipped)
        elif updated:
            torch._foreach_add_(updated, 1 - skipped, alpha=1)  # without alpha the host reads the tensor
        common = Common(rule, counts, None if scale is None else scale.to(device), skipped, weights)
        fits = triton_runs_on(device.type) and len(weights) <= 2 and all(map(_alike, rows))
        form = choose("adamw", *(row.parameter for row in rows), triton=fits)
        if form == "triton":
            from fewstep.kernels.fused import adamw as fused

            fused.update(rows, common)
        else:
            (reference if form == "reference" else closed)(rows, common)


def reference(rows: Sequence[Row], common: Common) -> None:
    """The update in the paper's words, tensor by tensor, in the dtype of each."""
    rule, skipped = common.rule, common.skip > 0
    b1, b2 = rule.betas
    for row in rows:
        if (moved := row.moved()) is not None:
            p, g, m, v, k = moved
            g = g if common.scale is None else g * common.scale.to(g.dtype)
            m_new = b1 * m + (1 - b1) * g
            v_new = b2 * v + (1 - b2) * g.square()
            m_hat, v_hat = m_new / (1 - b1 ** k.double()).to(p.dtype), v_new / (1 - b2 ** k.double()).to(p.dtype)
            p_new = (1 - rule.lr * rule.weight_decay) * p - rule.lr * m_hat / (v_hat.sqrt() + rule.eps)
            for old, new in ((p, p_new), (m, m_new), (v, v_new)):
                old.copy_(torch.where(skipped, old, new))
        for average, weight in zip(row.averages, common.weights, strict=True):
            if average is not None:
                average.add_(weight * (row.parameter - average))


def closed(rows: Sequence[Row], common: Common) -> None:
    """The same by torch's fused and foreach operations."""
    rule = common.rule
    for block in _blocks(rows) if common.counts.device.type == "cpu" else [rows]:
        moved = [tensors for row in block if (tensors := row.moved()) is not None]
        if moved:
            p, g, m, v, k = map(list, zip(*moved, strict=True))
            if common.scale is not None:
                torch._foreach_mul_(g, common.scale)
            torch._fused_adamw_(
                p,
                g,
                m,
                v,
                [],
                k,
                lr=rule.lr,
                beta1=rule.betas[0],
                beta2=rule.betas[1],
                weight_decay=rule.weight_decay,
                eps=rule.eps,
                amsgrad=False,
                maximize=False,
                found_inf=common.skip,
            )
        for number, weight in enumerate(common.weights):
            pairs = [(average, row.parameter) for row in block if (average := row.averages[number]) is not None]
            if pairs:
                torch._foreach_lerp_([average for average, _ in pairs], [p for _, p in pairs], weight)


def example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """Arguments of :func:`adamw` for as many parameters as ``shape`` says first, each of the shape that follows."""
    generator = torch.Generator().manual_seed(seed)
    parameters, gradients, averages = (
        [torch.randn(shape[1:], generator=generator).to(device, dtype) for _ in range(shape[0])] for _ in range(3)
    )
    return {
        "moments": Moments(parameters),
        "gradients": gradients,
        "rule": Rule(lr=1e-3),
        "scale": torch.full((), 0.5, device=device),
        "skip": torch.zeros((), device=device),
        "followers": [Follower(averages, 0.01)],
    }


def _blocks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of about :data:`BLOCK` elements together, in order; longer tensors are cut."""
    block: list[Row] = []
    size = 0
    for piece in (piece for row in rows for piece in _pieces(row)):
        block.append(piece)
        size += piece.parameter.numel()
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _pieces(row: Row) -> list[Row]:
    p = row.parameter
    if p.numel() <= BLOCK or not all(tensor.is_contiguous() for tensor in row.tensors()):
        return [row]

    def piece(start: int) -> Row:
        def cut(tensor: Tensor) -> Tensor:
            return tensor.view(-1)[start : start + BLOCK]

        gradient = None if row.gradient is None else cut(row.gradient)
        momenta = None if row.momenta is None else (cut(row.momenta[0]), cut(row.momenta[1]))
        averages = tuple(None if average is None else cut(average) for average in row.averages)
        return Row(cut(p), row.count, gradient, momenta, averages)

    return [piece(start) for start in range(0, p.numel(), BLOCK)]


def _alike(row: Row) -> bool:
    """Whether all tensors of a row are of one dtype and lie in memory in one order without gaps."""
    p = row.parameter
    dense = any(p.is_contiguous(memory_format=form) for form in _DENSE.get(p.dim(), (torch.contiguous_format,)))
    return dense and all(other.stride() == p.stride() and other.dtype == p.dtype for other in row.tensors())


_DENSE = {
    4: (torch.contiguous_format, torch.channels_last),
    5: (torch.contiguous_format, torch.channels_last_3d),
}
