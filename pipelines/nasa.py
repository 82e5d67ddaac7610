"""A pipeline that steers away from a negative prompt in its attention, at no further network call: NASA.

This file needs torch and diffusers alone. A student's folder holds a copy of it that differs in one line, which is
marked below: which stock pipeline it is. It loads with

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

and is called like the stock pipeline. Negative-away steer attention (Nguyen et al. 2024, SNOOPI, arXiv 2412.02687) is

    Z = Attn(Q, K(c+), V(c+)) - scale * Attn(Q, K(c-), V(c-))

with the layer's own projections, before that of the output. The tokens of the negative prompt travel through the
network behind those of the prompt, neither seen by the other. Where picture and text attend jointly, what is subtracted
is the part that the negative's tokens have in what the picture would see with them in the prompt's place. How a network
is called is seen, so that this file knows nothing of single families.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline as Stock  # <- stock
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CODE_FILE = "nasa.py"
TEXT = "encoder_hidden_states"
#: Arguments of networks that have an entry for each token of the text, and along which axis.
TOKENS = {TEXT: 1, "encoder_attention_mask": -1, "encoder_hidden_states_mask": -1, "txt_ids": -2}


class _SeenError(Exception):
    """Stops a pipeline at its network's first call, whose arguments it carries."""

    def __init__(self, network: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.arguments = network, arguments


@dataclass
class Steering:
    """How one network call is steered.

    Attributes:
        scale: what is subtracted is multiplied by it; at 0 nothing is.
        text_first: whether the text stands before the picture where they attend jointly.
        own: tokens of the prompt.
        away: tokens of the negative, which follow them.
        picture: tokens of the picture in joint attention; 0 until such was seen.
        steered: attentions that were.
    """

    scale: float
    text_first: bool = False
    own: int = 0
    away: int = 0
    picture: int = 0
    steered: int = 0

    @property
    def text(self) -> int:
        """Tokens of both prompts."""
        return self.own + self.away


class NegativeAway:
    """An attention processor around a layer's own one, whose text is that of the prompt and, behind it, the negative.

    Args:
        own: the layer's processor; it must compute by ``torch.nn.functional.scaled_dot_product_attention``.
        steering: of the network's present call.
    """

    def __init__(self, own: Any, steering: Steering) -> None:
        self.own, self.steering = own, steering
        self._signature = inspect.signature(own.__call__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        steering = self.steering
        given = self._signature.bind(*args, **kwargs).arguments
        hidden, text = given["hidden_states"], given.get(TEXT)
        if text is None:  # of the picture alone, or of both in one sequence
            beside = bool(steering.picture) and hidden.shape[1] == steering.picture + steering.text
        else:
            beside = text.shape[1] == steering.text
        if not beside:
            return self.own(*args, **kwargs)
        before = steering.steered
        with _Split(steering):
            result = self.own(*args, **kwargs)
        if steering.steered == before:
            raise ValueError(
                f"{type(self.own).__name__} does not attend by scaled_dot_product_attention, so that nothing can be "
                'steered away from; call set_attention_backend("native") on the network, or set stock processors'
            )
        return result


def around(own: Any, steering: Steering) -> NegativeAway:
    """A :class:`NegativeAway` with the signature of the processor inside, which diffusers reads off it."""

    @functools.wraps(type(own).__call__)
    def call(self: NegativeAway, *args: Any, **kwargs: Any) -> Any:
        return NegativeAway.__call__(self, *args, **kwargs)

    return type(NegativeAway.__name__, (NegativeAway,), {"__call__": call})(own, steering)


class _Split(TorchFunctionMode):
    """Inside, attention over the tokens of both prompts is two attentions, of which one is subtracted."""

    def __init__(self, steering: Steering) -> None:
        super().__init__()
        self.steering = steering

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._away(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _away(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Of queries (B, H, Q, D), keys and values (B, H, K, D), and a mask that broadcasts to (B, H, Q, K)."""
        steering = self.steering

        def attend(queries: Tensor | None, keys: Tensor, values: Tensor) -> Tensor:
            mask = attn_mask
            if mask is not None:
                mask = mask.index_select(-1, keys)
                if queries is not None and mask.shape[-2] > 1:
                    mask = mask.index_select(-2, queries)
            asked = query if queries is None else query.index_select(-2, queries)
            chosen = key.index_select(-2, keys)
            return F.scaled_dot_product_attention(asked, chosen, values, mask, *args, **kwargs)

        steering.steered += 1
        length = key.shape[-2]
        places = torch.arange(length, device=key.device)
        start = 0 if steering.text_first else length - steering.text
        positive = places[start : start + steering.own]
        negative = places[start + steering.own : start + steering.text]
        picture = torch.cat([places[:start], places[start + steering.text :]])
        if not len(picture):  # cross attention
            seen = attend(None, positive, value.index_select(-2, positive))
            return seen - steering.scale * attend(None, negative, value.index_select(-2, negative))
        steering.picture = len(picture)
        kept = torch.cat([places[: negative[0]], places[negative[-1] + 1 :]])
        others = torch.cat([places[: positive[0]], places[positive[-1] + 1 :]])
        hidden = value.index_fill(-2, picture, 0).index_select(-2, others)
        if query.shape[-2] != length:  # the picture alone asks
            seen = attend(None, kept, value.index_select(-2, kept))
            return seen - steering.scale * attend(None, others, hidden)
        result = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
        result.index_copy_(-2, kept, attend(kept, kept, value.index_select(-2, kept)))
        result.index_copy_(-2, negative, attend(negative, others, value.index_select(-2, others)))
        return result.index_add(-2, picture, attend(picture, others, hidden), alpha=-steering.scale)


def networks_of(pipeline: Any) -> list[nn.Module]:
    """The denoisers among a pipeline's components, by what diffusers calls such."""
    named = pipeline.components.items()
    return [part for name, part in named if isinstance(part, nn.Module) and name.startswith(("unet", "transformer"))]


def first_call(
    pipeline: Any, stock: type, prompt: str, arguments: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The network that a pipeline calls first, and that call's arguments by name, for one prompt; none is run.

    The call is that of the class ``stock`` with its ``arguments`` by name, in which ``prompt`` takes the place of every
    text and of every embedding of one. Raises ``ValueError`` where it calls none.
    """
    known = inspect.signature(stock.__call__).parameters
    # Not texts nor their embeddings: numbers (num_images_per_prompt) and tables (prompt_template).
    kept = (int, dict)
    words = {name: value for name, value in arguments.items() if "prompt" not in name or isinstance(value, kept)}
    words |= {name: prompt for name in ("prompt", "negative_prompt") if name in known}
    words.pop("latents", None)
    words |= {"generator": torch.Generator().manual_seed(0)}  # not the caller's, nor the global one

    def stop(network: nn.Module, args: Any, kwargs: Any) -> None:
        raise _SeenError(network, _by_name(network, args, kwargs))

    bar = dict(getattr(pipeline, "_progress_bar_config", None) or {})
    with contextlib.ExitStack() as stack:
        for network in networks_of(pipeline):
            stack.callback(network.register_forward_pre_hook(stop, with_kwargs=True).remove)
        pipeline.set_progress_bar_config(**{**bar, "disable": True})
        stack.callback(setattr, pipeline, "_progress_bar_config", bar)
        try:
            stock.__call__(pipeline, **words)
        except _SeenError as seen:
            return seen.network, seen.arguments
    raise ValueError(f"{stock.__name__} calls no network that is named unet or transformer")


def _by_name(network: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(network.forward).bind(*args, **kwargs)
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


@contextlib.contextmanager
def steering_of(network: nn.Module, negative: Mapping[str, Any], scale: float, text_first: bool) -> Iterator[None]:
    """Inside, the network steers away from a negative prompt; afterwards it is as it was.

    ``negative`` are the arguments of its call for that prompt, by name; for the rest see :class:`Steering`.
    """
    steering = Steering(scale, text_first)

    def behind(network: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        named = _by_name(network, args, kwargs)
        steering.own, steering.away = named[TEXT].shape[1], negative[TEXT].shape[1]
        steering.picture = steering.steered = 0
        both = {name: _joined(name, named, negative) for name in TOKENS if name in named}
        mask, hidden = named.get("attention_mask"), named.get("hidden_states")
        if mask is not None and hidden is not None and mask.shape[-1] == steering.own + hidden.shape[1]:
            end = steering.own if text_first else mask.shape[-1]  # over text and picture, as they attend jointly
            away = negative["attention_mask"][-1:]
            away = away[:, : steering.away] if text_first else away[:, -steering.away :]
            both["attention_mask"] = torch.cat([mask[:, :end], away.expand(len(mask), -1), mask[:, end:]], 1)
        return (), named | both

    def check(network: nn.Module, *_: Any) -> None:
        if not steering.steered:
            raise ValueError(f"no attention of {type(network).__name__} is known to see the text")

    with contextlib.ExitStack() as stack:
        stack.callback(network.register_forward_pre_hook(behind, with_kwargs=True).remove)
        stack.callback(network.register_forward_hook(check).remove)
        for module in network.modules():
            if hasattr(module, "set_processor") and hasattr(module, "processor"):
                stack.callback(module.set_processor, module.processor)
                module.set_processor(around(module.processor, steering))
        yield


def _joined(name: str, named: Mapping[str, Any], negative: Mapping[str, Any]) -> Any:
    """An argument for the tokens of both prompts; a mask that one of them lacks hides nothing."""
    axis, own, away = TOKENS[name], named[name], negative.get(name)
    if own is None and away is None:
        return None
    if own is None or away is None:
        given, text = (away, named[TEXT]) if own is None else (own, negative[TEXT])
        full = torch.ones(text.shape[:2], dtype=given.dtype, device=given.device)
        own, away = (full, away) if own is None else (own, full)
    if own.dim() > (1 if axis > 0 else -axis):  # one row for each sample; ids of tokens have none
        away = away[-1:].expand(len(own), *away.shape[1:])
    return torch.cat([own, away.to(own)], axis)


def nasa(stock: type[Stock]) -> type[Stock]:
    """The stock pipeline class with steering in its call.

    Its configuration has ``nasa_negative_prompt``, ``nasa_scale`` and ``nasa_text_first`` (see :class:`Steering`); its
    call takes the first two, too, for this call alone. At a scale of 0 it is the stock call.
    """

    class NasaPipeline(stock):  # type: ignore[misc, valid-type]
        code_file = CODE_FILE

        def __init__(
            self,
            *args: Any,
            nasa_negative_prompt: str = "",
            nasa_scale: float = 0.0,
            nasa_text_first: bool = False,
            **components: Any,
        ) -> None:
            super().__init__(*args, **components)
            self.register_to_config(
                nasa_negative_prompt=nasa_negative_prompt, nasa_scale=nasa_scale, nasa_text_first=nasa_text_first
            )

        __init__.__signature__ = _extended(
            stock.__init__, nasa_negative_prompt="", nasa_scale=0.0, nasa_text_first=False
        )

        @functools.wraps(stock.__call__)
        def __call__(
            self,
            *args: Any,
            nasa_negative_prompt: str | None = None,
            nasa_scale: float | None = None,
            **kwargs: Any,
        ) -> Any:
            away = self.config.nasa_negative_prompt if nasa_negative_prompt is None else nasa_negative_prompt
            scale = self.config.nasa_scale if nasa_scale is None else nasa_scale
            if not scale:
                return stock.__call__(self, *args, **kwargs)
            given = dict(inspect.signature(stock.__call__).bind(self, *args, **kwargs).arguments)
            given.pop("self")
            _, negative = first_call(self, stock, away, given)
            with contextlib.ExitStack() as stack:
                for network in networks_of(self):
                    stack.enter_context(steering_of(network, negative, scale, self.config.nasa_text_first))
                return stock.__call__(self, *args, **kwargs)

        __call__.__signature__ = _extended(stock.__call__, nasa_negative_prompt=None, nasa_scale=None)

        @functools.wraps(stock.save_pretrained)
        def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
            if getattr(diffusers, stock.__name__, None) is not stock:
                raise ValueError(f"{stock.__name__} is no class of diffusers: save the student itself, and steer that")
            stock.save_pretrained(self, save_directory, *args, **kwargs)
            _save_code(Path(save_directory), stock)

    NasaPipeline.__qualname__ = NasaPipeline.__name__
    return NasaPipeline


def _extended(function: Any, **defaults: Any) -> inspect.Signature:
    """The signature of a function with parameters more, which are given by name."""
    signature = inspect.signature(function)
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in defaults.items()]
    parameters = list(signature.parameters.values())
    rest = [parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
    return signature.replace(parameters=[*(p for p in parameters if p not in rest), *more, *rest])


def _save_code(folder: Path, stock: type[Stock]) -> None:
    """Put this file beside the pipeline, for this stock class, and name it in ``model_index.json``."""
    code = Path(__file__).read_text(encoding="utf-8")
    code = re.sub(r"^.*# <- stock$", f"from diffusers import {stock.__name__} as Stock  # <- stock", code, flags=re.M)
    (folder / CODE_FILE).write_text(code, encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = [CODE_FILE.removesuffix(".py"), "NasaPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


if Stock.__name__ != "DiffusionPipeline":  # in a student's folder
    NasaPipeline = nasa(Stock)
