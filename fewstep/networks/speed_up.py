"""An adapter on a frozen network's attention to its text, which stands for guidance and for several steps: SpeedUpNet.

Where the network attends to the text is observed, so that no family is known by name. The module itself lies in
:mod:`fewstep.pipelines.speed_up`, as it goes with a student.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.ragged import AnyConditioning, in_groups
from fewstep.diffusion.prediction import to_x0
from fewstep.errors import UserError
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.networks.recompute import checkpointed
from fewstep.networks.roles import NetworkRole, Role, allow_checkpointing, follow, is_trained
from fewstep.recording import Recording
from fewstep.recording.loop.call_parts import equal
from fewstep.recording.pipeline import is_quantized
from fewstep.recording.watch.hooks import hooked

#: The name of the added module, in a role and in a student's pipeline.
SPEED_UP = "speed_up"
# Relative, where both prompts are alike: the two offsets differ by rounding.
_EQUAL = {torch.float64: 1e-8, torch.float32: 1e-4}


class SpeedUpDenoiser(NetworkDenoiser):
    """A frozen network under an adapter, which is told the usual negative prompt or another one.

    Args:
        base: of the network alone.
        adapter: of :mod:`fewstep.pipelines.speed_up`.
    """

    def __init__(self, base: NetworkDenoiser, adapter: nn.Module) -> None:
        super().__init__(base.network, base.recipe, base.schedule, base.prediction_type, base.autocast, base.active)
        self.adapter: Any = adapter  # of a class that lies in a file of pipelines/
        self._told: Any = None

    def against(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, negative: AnyConditioning) -> Tensor:
        """x0 (B, ...) away from ``negative``, of B samples; the rest as in :class:`Denoiser`."""
        if isinstance(conditioning, Conditioning) and isinstance(negative, Conditioning):
            answer = self._away(x_t, t, conditioning, negative)
        else:  # texts of several lengths
            rows = range(len(x_t))
            parts = [(x_t[i : i + 1], t[i : i + 1], conditioning.select([i]), negative.select([i])) for i in rows]
            answer = torch.cat([self._away(x, time, one, other) for x, time, one, other in parts])  # type: ignore[arg-type]  # one sample is not ragged
        answer = self.settled(answer, x_t, t, conditioning)
        return to_x0(answer, self.prediction_type, x_t, self.schedule, t)

    def reenter(self) -> Callable[[], AbstractContextManager[None]]:
        """Makes the context of the pass that runs now, for a block that is run again in the backward pass."""
        told = self._told
        return nullcontext if told is None else lambda: self._again(told)

    def bare(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> Tensor:
        """As in :class:`fewstep.networks.denoiser.NetworkDenoiser`, away from the usual negative prompt."""

        def usual(x_t: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor | None) -> Tensor:
            return self._away(x_t, t, conditioning, None)

        return in_groups(usual, x_t, t, conditioning)

    def _away(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, negative: Conditioning | None) -> Tensor:
        other = None if negative is None else negative.arguments()
        # What is hooked runs as it is, not compiled.
        with hooked({}), self.adapter.on(self.network, other) as told:
            self._told = told
            try:
                return self._bare(x_t, t, conditioning)
            finally:
                self._told = None

    @contextmanager
    def _again(self, told: Any) -> Iterator[None]:
        with nullcontext() if self._told is told else self.adapter.telling(self.network, told):
            yield


class SpeedUpRecipe:
    """The recipe of a network under an adapter, by which an exported pipeline is compared with the trained one.

    Args:
        recipe: of the network alone.
        adapter: as in :class:`SpeedUpDenoiser`.
    """

    def __init__(self, recipe: Any, adapter: nn.Module) -> None:
        self._recipe = recipe
        self._adapter: Any = adapter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recipe, name)

    def calling(self, networks: Mapping[str, nn.Module]) -> SpeedUpRecipe:
        """That of another adapter of the same kind: in a student's files it has the dtype of the others there."""
        return SpeedUpRecipe(self._recipe, networks.get(SPEED_UP, self._adapter))

    def call(self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning, **words: Any) -> Tensor:
        """As :meth:`fewstep.recording.Recipe.call`."""
        with self._adapter.on(network):
            answer: Tensor = self._recipe.call(network, x, timestep, conditioning, **words)
        return answer


class PluggedRole(NetworkRole):
    """A role on the teacher's own network, of which nothing is its own: all that it has was added.

    Args:
        name: of the role.
        denoiser: on that network.
        stock: the recorded network, which the role's student is written with.
        adapter: that it owns.
    """

    part = "base"

    def __init__(self, name: str, denoiser: SpeedUpDenoiser, stock: nn.Module, adapter: nn.Module) -> None:
        super().__init__(name, denoiser, {SPEED_UP: adapter})
        self._stock = stock

    @property
    def weights(self) -> nn.Module:
        """None at all."""
        return nn.Module()

    def stock_network(self) -> nn.Module:
        """The teacher's, without the adapter."""
        return self._stock

    def copy_weights(self, other: Role) -> None:
        """Nothing: the network is one for all."""


@dataclass(frozen=True)
class TextSites:
    """Where a network attends to its text.

    Attributes:
        widths: of the queries, by the names of the attentions.
        embedder: the name of the module that embeds the text's tokens, where there is one.
        told: width of what the attentions are told.
    """

    widths: dict[str, int]
    embedder: str | None
    told: int


@torch.no_grad()
def find_text_sites(denoiser: NetworkDenoiser, x: Tensor, t: Tensor, conditioning: AnyConditioning) -> TextSites:
    """See :class:`TextSites`; x (B, ...), t (B,), and the conditioning of B samples.

    Raises:
        UserError: the network is told no text, or attends to none by itself.
    """
    network, text = denoiser.network, importlib.import_module("fewstep.pipelines.speed_up").TEXT
    modules = dict(network.named_modules())
    attentions = {name: m for name, m in modules.items() if all(hasattr(m, p) for p in ("to_q", "to_out", "heads"))}
    given: list[Tensor] = []
    widths: dict[str, int] = {}
    embedders: dict[str, int] = {}

    def note_text(_name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        tokens = inspect.signature(module.forward).bind(*args, **kwargs).arguments.get(text)
        given.extend([tokens] if isinstance(tokens, Tensor) and tokens.dim() == 3 else [])

    def note_site(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        told = inspect.signature(module.forward).bind(*args, **kwargs).arguments.get(text)
        if isinstance(told, Tensor) and isinstance(module.to_out, nn.ModuleList | nn.Sequential):
            query: Any = module.to_q  # every kind of linear layer
            widths[name] = query.out_features

    def note_embedder(name: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        told = bool(given) and any(value is given[0] for value in (*args, *kwargs.values()))
        if told and isinstance(output, Tensor) and output.shape[:-1] == given[0].shape[:-1]:
            embedders[name] = output.shape[-1]

    outside = {n: m for n, m in modules.items() if n and not any(f"{n}.".startswith(f"{a}.") for a in attentions)}
    sites = hooked(attentions, before=note_site)
    with hooked({"": network}, before=note_text), sites, hooked(outside, after=note_embedder):
        denoiser.raw(x, t, conditioning)
    if not given or not widths:
        raise UserError(
            f"{type(network).__name__} has no attention to a text's tokens, which is where SpeedUpNet's adapter sits; "
            "take another method"
        )
    embedder = min(embedders, key=len, default=None)
    return TextSites(widths, embedder, given[0].shape[-1] if embedder is None else embedders[embedder])


def make_speed_up(recording: Recording, network: nn.Module, sites: TextSites, negative: Conditioning, rank: int) -> Any:
    """An adapter for a network, whose usual negative prompt is ``negative``, of one sample.

    Both of its offsets begin with the attentions' own keys and values where these are told as wide tokens.

    Raises:
        UserError: the attentions' own keys and values are of another width, and ``rank`` is not 0.
    """
    file = importlib.import_module("fewstep.pipelines.speed_up")
    given = negative.arguments()
    mask = next((given[name] for name in file.MASKS if given.get(name) is not None), None)
    shape = list(given[file.TEXT].shape[1:])
    own = (recording.component, sites.widths, sites.told, shape, mask is not None, sites.embedder, rank)
    adapter = file.SpeedUp(*own)
    with torch.no_grad():
        adapter.usual_tokens.copy_(given[file.TEXT])
        if mask is not None:
            adapter.usual_mask.copy_(mask)
        for site, name in enumerate(adapter.names):
            less, more = adapter.negative[site], adapter.positive[site]
            for ours, theirs in zip((less.to_k, less.to_v), file.projections(network.get_submodule(name)), strict=True):
                shape = [sites.widths[name], sites.told]
                fits = list(theirs.weight.shape) == shape
                if rank and not fits:
                    raise UserError(
                        f"the keys of {name} are {list(theirs.weight.shape)} and not {shape}, so nothing of low rank "
                        "can be added to them; leave out --lora_rank"
                    )
                if fits and not rank:
                    ours.up.weight.copy_(theirs.weight)
            more.load_state_dict(less.state_dict())
    return adapter


def plugged_roles(
    settings: RoleSettings,
    recording: Recording,
    samples: tuple[Tensor, Tensor, AnyConditioning],
    device: torch.device,
) -> dict[str, Role]:
    """The frozen teacher, and a student (and ``ema``) that is its network under an adapter.

    Args:
        settings: of the run's roles; ``lora_rank`` is that of the adapter's keys and values.
        recording: of the teacher.
        samples: two of noise, times (2,), and the conditioning of both; the first one's further answer is of the usual
            negative prompt.
        device: of the roles.

    Raises:
        UserError: the teacher is not guided, is quantised, has several networks, or does not attend to a text.
    """
    if not samples[2].others:
        raise UserError("SpeedUpNet's adapter stands for guidance, which this teacher lacks; take another method")
    if is_quantized(recording.network) or len(recording.experts) > 1:
        raise UserError(f"SpeedUpNet's adapter is for one {recording.component}, in full precision; take dmd2")
    roles = make_roles(replace(settings, lora_rank=0, full_critic=False, ema=False), recording, (), device)
    base = roles["teacher"].single.denoiser
    negative = samples[2].others[0].select([0])
    assert isinstance(negative, Conditioning)  # one sample is not ragged
    sites = find_text_sites(base, *samples)
    for name in ("student", *(["ema"] if settings.ema else [])):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            adapter = make_speed_up(recording, recording.network, sites, negative, settings.lora_rank)
        adapter.to(device).eval().requires_grad_(name == "student" and is_trained(name))
        roles[name] = PluggedRole(name, SpeedUpDenoiser(base, adapter), recording.network, adapter)
    follow(roles)
    if settings.gradient_checkpointing:
        student: Any = roles["student"].denoiser

        def again(block: Callable[..., Any], *args: Any) -> Any:
            return checkpointed(block, args, student.reenter())

        allow_checkpointing(base.network, again)
    return roles


@torch.no_grad()
def refuse_unlike(roles: dict[str, Role], samples: tuple[Tensor, Tensor, AnyConditioning]) -> None:
    """Raise ``UserError`` where an adapter that is told one prompt twice is not the identity."""
    x, t, conditioning = samples
    student: Any = roles["student"].denoiser
    theirs, ours = roles["teacher"](x, t, conditioning), student.against(x, t, conditioning, conditioning)
    if not float((ours - theirs).abs().max()) <= _EQUAL.get(theirs.dtype, 3e-2) * float(theirs.abs().max()):
        kind = type(student.network).__name__
        raise UserError(f"{kind} makes more of its attention to the text than can be seen; take another method")


def refuse_several_negatives(one: AnyConditioning, other: AnyConditioning) -> None:
    """Raise ``UserError`` where the first samples of two have negative prompts that differ: an adapter keeps one.

    Args:
        one: conditioning of samples, with their negative's.
        other: of others, each as it is alone.
    """
    text = importlib.import_module("fewstep.pipelines.speed_up").TEXT
    first, last = (each.others[0].select([0]) for each in (one, other))
    assert isinstance(first, Conditioning) and isinstance(last, Conditioning)  # one sample is not ragged
    a, b = (each.arguments().get(text) for each in (first, last))
    if a is not None and not equal(a, b):
        raise UserError(
            "SpeedUpNet's adapter keeps one negative prompt, and here each item has another (is its text encoder "
            "shown the picture?); give a negative_prompt in --call that is the same for all, or take dmd2"
        )
