"""Features of a stock network, tapped by a forward hook; the network stops there and nothing of it is rewritten.

The tap sits at a UNet's mid block, elsewhere at half depth of the longest list of blocks. A transformer's block may
carry text beside the image, as a stream of its own or in one sequence; only the image tokens are features. Which
those are is observed: before the two mix, they are the ones that change when the sample changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.recording.watch.hooks import hooked


class _Reached(Exception):  # noqa: N818 - it ends a forward pass early and is no error
    """Raised by the tap's hook; never leaves :meth:`FeatureTap.on`."""


@dataclass
class Seen:
    """Where a tap puts what it saw: (B, C, H, W), (B, C, F, H, W) or image tokens (B, N, C)."""

    features: Tensor = field(init=False)


@dataclass(frozen=True)
class FeatureTap:
    """A place in a network.

    Attributes:
        module: its name, as in ``network.get_submodule``.
        output: which of the tensors that the module returns.
        tokens: positions of the image in a sequence that also holds text, None for all. Behind the text they count from
            the end (-n..-1), so that they hold for texts of every length.
    """

    module: str
    output: int = 0
    tokens: tuple[int, ...] | None = None

    @contextmanager
    def on(self, network: nn.Module) -> Iterator[Seen]:
        """Run the network inside this context: it ends at the tap, and the features are in the yielded object."""
        seen = Seen()

        reached: list[Tensor] = []

        def stop(_name: str, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            reached.append(_tensors(output)[self.output])
            raise _Reached

        try:
            # A compiled network would not notice the hook, or keep it for its next pass: this pass is not compiled.
            modules = {self.module: network.get_submodule(self.module)}
            with hooked(modules, after=stop), torch.compiler.set_stance("force_eager"):
                yield seen
        except _Reached:
            # Out here, because a checkpointed block must not save more tensors than its recomputation will.
            features = reached[0] if self.tokens is None else reached[0][:, list(self.tokens)]
            seen.features = features.float() if features.dtype.itemsize < 4 else features
            return
        raise RuntimeError(f"the network never called its module {self.module!r}, where features were to be tapped")


@torch.no_grad()
def find_tap(network: nn.Module, run: Callable[[Tensor], Any], x: Tensor) -> FeatureTap:
    """Where to tap ``network``.

    Args:
        network: a stock diffusers network.
        run: calls it on a sample of the shape of ``x``.
        x: any sample (B, ...).

    Raises:
        UserError: the network has neither a mid block nor a list of blocks, or its image tokens cannot be told apart.
    """
    if getattr(network, "mid_block", None) is not None:
        return FeatureTap("mid_block")
    lists = lists_of_blocks(network)
    if not lists:
        raise UserError(f"{type(network).__name__} has no mid block and no list of blocks to tap features from")
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    entries = {name: f"{name}.0" for name in lists}
    first, second = (_observe(network, list(entries.values()), run, sample) for sample in (x, other))
    reacting = {name: _reacting(first[e], second[e]) for name, e in entries.items() if e in first}
    reacting = {name: streams for name, streams in reacting.items() if streams}
    if not reacting:
        raise UserError(f"no block of {type(network).__name__} reacts to the sample; its weights are degenerate")
    longest = max(reacting, key=lambda name: len(lists[name]))
    block = f"{longest}.{max(len(lists[longest]) // 2 - 1, 0)}"
    # Where one input alone reacts to the sample, that is the image, and text has not met it yet.
    apart = [streams for streams in reacting.values() if len(streams) == 1]
    if not apart:
        raise UserError(f"no block of {type(network).__name__} has the image apart from the text; train without a GAN")
    entry = reacting[longest]
    mixed = len(entry) != 1
    # Behind that, the image has kept its argument's name and its length.
    image, tokens = next(iter((min(apart, key=_length) if mixed else entry).items()))
    positions = list(range(int(tokens.sum()))) if mixed else tokens.nonzero().flatten().tolist()

    passage = _observe(network, [block], run, x)[block]
    outputs, source = passage.outputs, passage.inputs.get(image)
    whole = [k for k, tensor in enumerate(outputs) if tensor.shape[1] == len(positions)]
    if whole:
        return FeatureTap(block, max(whole, key=lambda k: _similarity(outputs[k], source)))
    longer = [k for k, tensor in enumerate(outputs) if tensor.shape[1] > len(positions)]
    if not mixed and source is not None and longer and outputs[longer[0]].shape[1] == source.shape[1]:
        length = source.shape[1]
        if positions == list(range(length - len(positions), length)):
            positions = [position - length for position in positions]
        return FeatureTap(block, longer[0], tuple(positions))
    raise UserError(
        f"cannot tell image tokens from text tokens in {type(network).__name__}.{block}; train without a GAN"
    )


def likely_tap(network: nn.Module) -> FeatureTap:
    """Where :func:`find_tap` would tap, by names alone: for networks that cannot be run. All tokens count as image.

    Raises:
        UserError: the network has neither a mid block nor a list of blocks.
    """
    if getattr(network, "mid_block", None) is not None:
        return FeatureTap("mid_block")
    lists = lists_of_blocks(network)
    if not lists:
        raise UserError(f"{type(network).__name__} has no mid block and no list of blocks to tap features from")
    longest = max(lists, key=lambda name: len(lists[name]))
    return FeatureTap(f"{longest}.{max(len(lists[longest]) // 2 - 1, 0)}")


def lists_of_blocks(network: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists that are not inside another list's blocks, by name; of those with one block only where all are."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in network.named_modules():  # parents come first
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{n}.") for n in lists):
            lists[name] = module
    return {name: blocks for name, blocks in lists.items() if len(blocks) > 1} or lists


@dataclass
class _Passage:
    """The token tensors (B, N, C) that went into one block, by argument, and the tensors that came out of it."""

    inputs: dict[str, Tensor]
    outputs: list[Tensor]


def tapped(denoisers: Sequence[Any], x: Tensor, t: Tensor, conditions: Any) -> tuple[FeatureTap, Tensor]:
    """Where the networks of one role are tapped, the same place in each, and the features of two samples there.

    Args:
        denoisers: see :class:`fewstep.networks.denoiser.NetworkDenoiser`.
        x: samples (2, ...).
        t: times (2,).
        conditions: of a run; the first, the middle and the last of them are tried.

    Raises:
        UserError: the features lie elsewhere for some prompts, or in some networks, or cannot be tapped.
    """
    last, seen = len(conditions) - 1, []
    for denoiser in denoisers:
        for row in dict.fromkeys((0, last // 2, last)):
            conditioning = conditions.select([row, row])
            tap = find_tap(denoiser.network, partial(denoiser.raw, t=t, conditioning=conditioning), x)
            with torch.no_grad():
                seen.append((tap, denoiser.features(x, t, conditioning, tap)))
    tap, features = seen[0]
    if any(other != tap or theirs.shape != features.shape for other, theirs in seen):
        raise UserError("the image's features lie elsewhere for every prompt, or in every network; train without a GAN")
    return tap, features


def _observe(network: nn.Module, names: list[str], run: Callable[[Tensor], Any], x: Tensor) -> dict[str, _Passage]:
    passages: dict[str, _Passage] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if name not in passages:
            inputs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            tokens = {argument: value.clone() for argument, value in inputs.items() if _is_tokens(value)}
            passages[name] = _Passage(tokens, _tensors(output))

    with hooked({name: network.get_submodule(name) for name in names}, after=note):
        run(x)
    return passages


def _is_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()


def _tensors(output: Any) -> list[Tensor]:
    """The tensors a module returned, in order; a mid block returns one, a joint block two."""
    if isinstance(output, Tensor):
        return [output]
    return [value for value in output if isinstance(value, Tensor)]


def _reacting(first: _Passage, second: _Passage) -> dict[str, Tensor]:
    """The inputs that differ between two samples, and which of their tokens (N,) do."""
    masks = {name: (tokens != second.inputs[name]).any(dim=2).any(dim=0) for name, tokens in first.inputs.items()}
    return {name: mask for name, mask in masks.items() if bool(mask.any())}


def _length(streams: dict[str, Tensor]) -> int:
    """How many tokens of the first stream react."""
    return int(next(iter(streams.values())).sum())


def _similarity(output: Tensor, source: Tensor | None) -> float:
    """How much of a stream's input is left in an output; blocks are residual, so its own output holds the most."""
    if source is None or source.shape != output.shape:
        return 0.0
    return float(torch.cosine_similarity(output.flatten().float(), source.flatten().float(), dim=0))
