"""A pipeline whose network has an adapter on its attention to the text, which stands for guidance: SpeedUpNet students.

This file needs torch and diffusers alone. A student's folder holds copies of it that differ in one line, the one marked
below: which stock pipeline it is. It loads with

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

and is called like the stock pipeline without guidance; a ``negative_prompt`` is heeded all the same, by the adapter.
The network's own weights are the teacher's, so that the adapter fits every fine-tuned copy of it (``fewstep.plug``).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline as Stock  # <- stock
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

CODE_FILE = "speed_up.py"
TEXT = "encoder_hidden_states"
MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")
_TINY = 1e-12


@dataclass
class Text:
    """Tokens (B, L, D) of prompts, and which of them count (B, L); None for all."""

    tokens: Tensor
    mask: Tensor | None = None

    def rows(self, count: int) -> Text:
        """The same for ``count`` rows, a multiple of B."""
        times = count // len(self.tokens)
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return Text(self.tokens.repeat_interleave(times, 0), mask)


@dataclass
class Told:
    """What the attentions are told in one call of their network: both texts, and each one's query (B, N, D)."""

    positive: Text | None = None
    negative: Text | None = None
    queries: dict[str, Tensor] = field(default_factory=dict)


class _SeenError(Exception):
    """Stops a pipeline at its network's first call, whose arguments it carries."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


class Projection(nn.Module):
    """Keys or values of tokens: by weights of its own, or by the attention's and a product of low rank beside them."""

    def __init__(self, told: int, width: int, rank: int = 0) -> None:
        super().__init__()
        self.down = nn.Linear(told, rank, bias=False) if rank else None
        self.up = nn.Linear(rank or told, width, bias=False)
        if rank:
            nn.init.zeros_(self.up.weight)

    def forward(self, tokens: Tensor, own: nn.Linear) -> Tensor:
        """(B, L, D') of tokens (B, L, D); ``own`` is the attention's projection."""
        if self.down is None:
            return self.up(tokens)
        return own(tokens.to(own.weight.dtype)) + self.up(self.down(tokens))


class Offset(nn.Module):
    """What one attention adds for one prompt: attention of its own keys and values, scaled and shifted by channel."""

    def __init__(self, told: int, width: int, rank: int = 0) -> None:
        super().__init__()
        self.to_k = Projection(told, width, rank)
        self.to_v = Projection(told, width, rank)
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, query: Tensor, text: Text, own: Tensor, attention: nn.Module) -> Tensor:
        """gamma A |A0| / |A| + beta (B, N, D), the norms over each sample.

        Args:
            query: (B, N, D).
            text: of B prompts.
            own: the network's own attention A0 (B, N, D).
            attention: the module that it is of.
        """
        tokens, (k_of, v_of) = text.tokens.to(self.scale.dtype), projections(attention)
        k, v = self.to_k(tokens, k_of), self.to_v(tokens, v_of)
        q, k, v = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (query.to(k.dtype), k, v.to(k.dtype)))
        mask = None if text.mask is None else (text.mask > 0)[:, None, None]
        answer = scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        length = own.detach().float().flatten(1).norm(dim=1) / answer.float().flatten(1).norm(dim=1).clamp(min=_TINY)
        return (self.scale * (answer * length[:, None, None]) + self.shift).to(own.dtype)


class SpeedUp(ModelMixin, ConfigMixin):
    """The adapter: for each attention to the text an offset of the negative prompt, and one of the positive.

    Where both are alike and so are the prompts, it is the identity.

    Args:
        network: the network's name in its pipeline.
        sites: attentions of the network, and the width of their queries.
        told: width of the tokens that they are told.
        tokens: numbers and width of the usual negative prompt's tokens, as the network is given them.
        masked: whether some of these do not count.
        embedder: the network's module that embeds tokens, where it has one.
        rank: of what is added to the attention's own keys and values; 0 for keys and values of the adapter's own.
    """

    @register_to_config
    def __init__(
        self,
        network: str,
        sites: dict[str, int],
        told: int,
        tokens: list[int],
        masked: bool = False,
        embedder: str | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.names = sorted(sites)  # a configuration's file has them in this order
        self.negative = nn.ModuleList(Offset(told, sites[name], rank) for name in self.names)
        self.positive = nn.ModuleList(Offset(told, sites[name], rank) for name in self.names)
        self.register_buffer("usual_tokens", torch.zeros(1, *tokens))
        self.register_buffer("usual_mask", torch.ones(1, tokens[0]) if masked else None)

    @contextlib.contextmanager
    def on(self, network: nn.Module, negative: Mapping[str, Any] | None = None) -> Iterator[Told]:
        """Inside, the network's calls have the offset: out(A0 - offset of the negative + offset of the positive).

        Args:
            network: the one that it was trained on, or a fine-tuned copy.
            negative: arguments of the network's call for the negative prompts, by name; default the usual one's.
        """
        usual = {TEXT: self.usual_tokens, MASKS[0]: self.usual_mask}
        told = Told()

        def read(network: nn.Module, args: Any, kwargs: Any) -> None:
            given = _by_name(network, args, kwargs)
            told.positive = self.text(network, given, given[TEXT])
            told.negative = self.text(network, usual if negative is None else negative, given[TEXT])

        handle = network.register_forward_pre_hook(read, with_kwargs=True)
        try:
            with self.telling(network, told):
                yield told
        finally:
            handle.remove()

    def text(self, network: nn.Module, given: Mapping[str, Any], like: Tensor) -> Text:
        """The text among a call's arguments, as the network's attentions are told it."""
        tokens = given[TEXT].to(like)
        if self.config.embedder is not None:
            tokens = network.get_submodule(self.config.embedder)(tokens)
        mask = next((given[name] for name in MASKS if given.get(name) is not None), None)
        return Text(tokens, None if mask is None else mask.to(like.device))

    @contextlib.contextmanager
    def telling(self, network: nn.Module, told: Told) -> Iterator[None]:
        """Inside, the attentions of a network have the offset for what is ``told`` when they run."""
        with contextlib.ExitStack() as stack:
            for site, name in enumerate(self.names):
                attention = network.get_submodule(name)
                remember = functools.partial(_remember, told, name)
                add = functools.partial(self._add, told, site, attention)
                stack.callback(attention.to_q.register_forward_hook(remember).remove)
                stack.callback(attention.to_out[0].register_forward_pre_hook(add).remove)
            yield

    def _add(self, told: Told, site: int, attention: nn.Module, _out: nn.Module, given: tuple[Tensor]) -> Any:
        own, query = given[0], told.queries.pop(self.names[site])
        less = self.negative[site](query, told.negative.rows(len(query)), own, attention)
        more = self.positive[site](query, told.positive.rows(len(query)), own, attention)
        return (own - less + more, *given[1:])


def _remember(told: Told, name: str, _module: nn.Module, _given: Any, query: Tensor) -> None:
    told.queries[name] = query


def projections(attention: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """An attention's own projections of the text to keys and to values."""
    if getattr(attention, "add_k_proj", None) is not None:
        return attention.add_k_proj, attention.add_v_proj
    return attention.to_k, attention.to_v


def speed_up(stock: type[Stock]) -> type[Stock]:
    """The stock pipeline class with a :class:`SpeedUp` among its components."""

    class SpeedUpPipeline(stock):  # type: ignore[misc, valid-type]
        code_file = CODE_FILE

        def __init__(self, *args: Any, speed_up: Any, **components: Any) -> None:
            super().__init__(*args, **components)
            self.register_modules(speed_up=speed_up)

        __init__.__signature__ = _signature(stock)

        @functools.wraps(stock.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            given = dict(inspect.signature(stock.__call__).bind(self, *args, **kwargs).arguments)
            given.pop("self")
            network, away = getattr(self, self.speed_up.config.network), given.get("negative_prompt")
            told = None if away is None else first_call(self, network, stock, away, given)
            with self.speed_up.on(network, told):
                return stock.__call__(self, *args, **kwargs)

        @functools.wraps(stock.save_pretrained)
        def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
            stock.save_pretrained(self, save_directory, *args, **kwargs)
            _save_code(Path(save_directory), stock)

    SpeedUpPipeline.__qualname__ = SpeedUpPipeline.__name__
    return SpeedUpPipeline


def first_call(
    pipeline: Any, network: nn.Module, stock: type, prompt: str | Sequence[str], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments by name of a pipeline's first call of its network, for these prompts; the network does not run.

    The call is that of the class ``stock`` with its ``arguments`` by name, in which ``prompt`` takes the place of every
    text and of every embedding of one. Raises ``ValueError`` where it does not call the network.
    """
    known = inspect.signature(stock.__call__).parameters
    # Not texts nor their embeddings: numbers (num_images_per_prompt) and tables (prompt_template).
    words = {name: v for name, v in arguments.items() if "prompt" not in name or isinstance(v, int | dict)}
    words |= {name: prompt for name in ("prompt", "negative_prompt") if name in known}
    words.pop("latents", None)
    words |= {"generator": torch.Generator().manual_seed(0)}  # not the caller's, nor the global one

    def stop(network: nn.Module, args: Any, kwargs: Any) -> None:
        raise _SeenError(_by_name(network, args, kwargs))

    bar = dict(getattr(pipeline, "_progress_bar_config", None) or {})
    with contextlib.ExitStack() as stack:
        stack.callback(network.register_forward_pre_hook(stop, with_kwargs=True).remove)
        pipeline.set_progress_bar_config(**{**bar, "disable": True})
        stack.callback(setattr, pipeline, "_progress_bar_config", bar)
        try:
            stock.__call__(pipeline, **words)
        except _SeenError as seen:
            return seen.arguments
    raise ValueError(f"{stock.__name__} does not call its {type(network).__name__}")


def _by_name(network: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(network.forward).bind(*args, **kwargs)
    return dict(bound.arguments)


def _signature(stock: type[Stock]) -> inspect.Signature:
    """That of the stock constructor, with a parameter more: diffusers reads off it what to load."""
    required, optional = [], []
    for parameter in inspect.signature(stock.__init__).parameters.values():
        (required if parameter.default is inspect.Parameter.empty else optional).append(parameter)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([*required, inspect.Parameter("speed_up", kind), *optional])


def _save_code(folder: Path, stock: type[Stock]) -> None:
    """Put this file beside the pipeline and beside its adapter, and name it in ``model_index.json``."""
    code = Path(__file__).read_text(encoding="utf-8")
    code = re.sub(r"^.*# <- stock$", f"from diffusers import {stock.__name__} as Stock  # <- stock", code, flags=re.M)
    for place in (folder, folder / "speed_up"):
        (place / CODE_FILE).write_text(code, encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    module = CODE_FILE.removesuffix(".py")
    index |= {"_class_name": [module, "SpeedUpPipeline"], "speed_up": [module, "SpeedUp"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


if Stock.__name__ != "DiffusionPipeline":  # in a student's folder
    SpeedUpPipeline = speed_up(Stock)
