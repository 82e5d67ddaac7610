"""A pipeline of several students, one for each part of what is asked for: a prompt or label goes to its own (MSD).

This file needs torch and diffusers alone. A student's folder holds copies of it that differ in two lines, the ones
marked below: which stock pipeline it is, and what its networks are called. It loads with

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

and is called like the stock pipeline. A label is looked up. So is a prompt that a student was trained for where prompts
were listed; any other goes to the student whose prompts are nearest to it, in what the stock pipeline hands its network
for a prompt. Each student makes the samples that are its own, in one call of the stock pipeline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline as Stock  # <- stock
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

EXPERTS: tuple[str, ...] = ()  # <- experts
CODE_FILE = "multi_student.py"
#: How the arguments begin that hold something for each sample; the others are for all of them.
_OF_SAMPLES = ("prompt", "negative_prompt", "generator", "latents", "image")
_COPIES = ("num_images_per_prompt", "num_videos_per_prompt")


class Router(ModelMixin, ConfigMixin):
    """Which student a request goes to.

    Args:
        subject: the argument of the stock pipeline that holds the requests, ``prompt`` or ``class_labels``.
        students: how many there are.
        known: request, a label or :func:`known_as` of a prompt, -> number of its student, from 0.
        places: where in the network's arguments the tensors are that tell prompts apart.
        width: of a prompt's :func:`place_means` at these places; 0 where only what is known can be asked for.
        call: further arguments of the stock pipeline's call that shows them: those that a student is sampled with.
    """

    @register_to_config
    def __init__(
        self,
        subject: str,
        students: int,
        known: dict[str, int] | None = None,
        places: list[str] | None = None,
        width: int = 0,
        call: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.centroids = nn.Parameter(torch.zeros(students, width), requires_grad=False)

    def look_up(self, request: Any) -> int | None:
        """The number of the student that was trained for this very label or prompt, from 0; None for any other."""
        name = known_as(request) if isinstance(request, str) else str(int(request))
        return (self.config.known or {}).get(name)

    def nearest(self, means: Mapping[str, Tensor]) -> int:
        """The number of the student whose prompts are nearest to this one, from 0."""
        place = torch.cat([means[name] for name in self.config.places])
        return int((self.centroids.float().cpu() - place).square().sum(1).argmin())


def known_as(prompt: str) -> str:
    """A short name of a prompt, so that no list of prompts need lie beside a student."""
    return hashlib.blake2b(prompt.strip().encode(), digest_size=8).hexdigest()


def place_means(arguments: Any, place: str = "") -> dict[str, Tensor]:
    """The floating tensors (..., D) in a network's arguments for one sample, each as its mean (D,), by their place."""
    if isinstance(arguments, Tensor):
        told = arguments.is_floating_point() and arguments.dim() > 1
        return {place: arguments.detach().float().cpu().flatten(0, -2).mean(0)} if told else {}
    found: dict[str, Tensor] = {}
    if isinstance(arguments, Mapping):
        for name, value in arguments.items():
            found |= place_means(value, f"{place}.{name}" if place else str(name))
    elif isinstance(arguments, list | tuple):
        for number, value in enumerate(arguments):
            found |= place_means(value, f"{place}[{number}]")
    return found


def multi_student(stock: type[Stock], experts: tuple[str, ...]) -> type[Stock]:
    """The stock pipeline class with a network for each student, and a :class:`Router`.

    Args:
        stock: a diffusers pipeline class.
        experts: names of the students' networks; the first is the denoiser's own name in the stock class.
    """

    class MultiStudentPipeline(stock):  # type: ignore[misc, valid-type]
        code_file = CODE_FILE
        model_cpu_offload_seq = _offloading(stock, experts)
        #: The samples of the whole call that the present call of the stock pipeline makes; None outside of it.
        rows_in_call: list[int] | None = None

        def __init__(self, *args: Any, router: Any, **components: Any) -> None:
            own = {name: components.pop(name) for name in experts[1:]}
            super().__init__(*args, **components)
            self.register_modules(**own, router=router)

        __init__.__signature__ = _signature(stock, experts)

        @functools.wraps(stock.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(stock.__call__).bind(self, *args, **kwargs).arguments
            del given["self"]
            given |= given.pop("kwargs", {})
            requests = given.get(self.router.config.subject)
            if requests is None:
                raise ValueError(
                    f"without {self.router.config.subject} it is not known which student is asked: give it, or call "
                    "one of them, pipe.student(number)"
                )
            if not isinstance(requests, list | tuple | Tensor):
                with _put_in(self, experts, self.route(requests), None):
                    return stock.__call__(self, **given)
            asked: dict[int, list[int]] = {}
            for row, request in enumerate(requests):
                asked.setdefault(self.route(request), []).append(row)
            copies = next((given[name] for name in _COPIES if given.get(name)), 1)
            outputs = []
            for number, rows in asked.items():
                samples = [row * copies + copy for row in rows for copy in range(copies)]
                with _put_in(self, experts, number, samples):
                    own = {name: _of_rows(name, value, rows, samples, self, requests) for name, value in given.items()}
                    outputs.append((samples, stock.__call__(self, **own)))
            return outputs[0][1] if len(outputs) == 1 else _joined(outputs)

        def route(self, request: Any) -> int:
            """The number of the student that a prompt or label goes to, from 0."""
            number = self.router.look_up(request)
            if number is None and not self.router.config.width:
                raise ValueError(f"no student was trained for {request!r}")
            return self.router.nearest(self._means(request)) if number is None else number

        def student(self, number: int) -> Any:
            """The stock pipeline of one student, from 0, on the same weights."""
            parts = {name: part for name, part in self.components.items() if name not in ("router", *experts[1:])}
            return stock(**{**parts, experts[0]: getattr(self, experts[number])})

        def _means(self, prompt: str) -> dict[str, Tensor]:
            """What the stock pipeline hands its network for a prompt: it is run up to there."""
            seen: list[dict[str, Any]] = []
            network = getattr(self, experts[0])
            signature = inspect.signature(network.forward)

            def note(_network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.append(signature.bind(*args, **kwargs).arguments)
                raise _SeenError

            bar = dict(getattr(self, "_progress_bar_config", None) or {})
            hook = network.register_forward_pre_hook(note, with_kwargs=True)
            try:
                self.set_progress_bar_config(**{**bar, "disable": True})
                # A generator of its own, as a user's shall not have been asked for anything.
                call = {**(self.router.config.call or {}), "generator": torch.Generator().manual_seed(0)}
                with contextlib.suppress(_SeenError):
                    stock.__call__(self, **{**call, self.router.config.subject: prompt})
            finally:
                hook.remove()
                self.set_progress_bar_config(**bar)
            return place_means(seen[0])

        @functools.wraps(stock.save_pretrained)
        def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
            stock.save_pretrained(self, save_directory, *args, **kwargs)
            save_code(Path(save_directory), stock.__name__, experts)

    MultiStudentPipeline.__qualname__ = MultiStudentPipeline.__name__
    return MultiStudentPipeline


class _SeenError(Exception):
    """The network was about to be called, and what it would be told is known."""


@contextlib.contextmanager
def _put_in(pipeline: Any, experts: Sequence[str], number: int, samples: list[int] | None) -> Iterator[None]:
    """Inside, a student's network is the stock pipeline's, and it is known which samples are made."""
    first = getattr(pipeline, experts[0])
    # Past the pipeline's own __setattr__, which would write the network into the configuration.
    pipeline.__dict__ |= {experts[0]: getattr(pipeline, experts[number]), "rows_in_call": samples}
    try:
        yield
    finally:
        pipeline.__dict__ |= {experts[0]: first, "rows_in_call": None}


def _of_rows(name: str, value: Any, rows: list[int], samples: list[int], pipeline: Any, requests: Sized) -> Any:
    """What of an argument belongs to some of the requests, or to their samples where it has one value for each."""
    if not name.startswith((pipeline.router.config.subject, *_OF_SAMPLES)) or not isinstance(value, list | Tensor):
        return value
    if len(value) == len(requests):
        wanted = rows
    elif len(value) == len(requests) * (len(samples) // len(rows)):
        wanted = samples
    else:
        return value
    return value[wanted] if isinstance(value, Tensor) else [value[row] for row in wanted]


def _joined(outputs: list[tuple[list[int], Any]]) -> Any:
    """The answers of several calls as one call's, every sample in its place."""
    places = [place for samples, _ in outputs for place in samples]
    order = sorted(range(len(places)), key=places.__getitem__)
    answers = [answer for _, answer in outputs]
    if isinstance(answers[0], Mapping):  # diffusers' outputs, which leave out of the mapping what is None
        names = [one.name for one in dataclasses.fields(answers[0])]
        return type(answers[0])(**{n: _in_order([getattr(answer, n) for answer in answers], order) for n in names})
    return tuple(_in_order(list(parts), order) for parts in zip(*answers, strict=True))


def _in_order(parts: list[Any], order: list[int]) -> Any:
    if any(part is None for part in parts):  # no safety checker
        return None
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)[order]
    if isinstance(parts[0], list):
        return [[one for part in parts for one in part][row] for row in order]
    together = torch.cat([torch.from_numpy(part) for part in parts])  # numpy's
    return together[order].numpy()


def _signature(stock: type[Stock], experts: tuple[str, ...]) -> inspect.Signature:
    """That of the stock constructor, with a parameter for each network: diffusers reads off it what to load."""
    stocks = dict(inspect.signature(stock.__init__).parameters)
    required, optional = [], []
    for parameter in stocks.values():
        (required if parameter.default is inspect.Parameter.empty else optional).append(parameter)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    required += [inspect.Parameter(name, kind) for name in (*experts[1:], "router")]
    return inspect.Signature([*required, *optional])


def _offloading(stock: type[Stock], experts: tuple[str, ...]) -> str | None:
    """The stock order in which components visit the device, with all networks in the denoiser's place."""
    order = stock.model_cpu_offload_seq
    return order and re.sub(rf"\b{experts[0]}\b", "->".join(experts), order) if experts else order


def save_code(folder: Path, stock: str, experts: tuple[str, ...]) -> None:
    """Put this file beside the pipeline and beside its router, and name it in ``model_index.json``."""
    code = Path(__file__).read_text(encoding="utf-8")
    code = re.sub(r"^.*# <- stock$", f"from diffusers import {stock} as Stock  # <- stock", code, flags=re.M)
    code = re.sub(r"^.*# <- experts$", f"EXPERTS: tuple[str, ...] = {experts!r}  # <- experts", code, flags=re.M)
    for place in (folder, folder / "router"):
        (place / CODE_FILE).write_text(code, encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    module = CODE_FILE.removesuffix(".py")
    index |= {"_class_name": [module, "MultiStudentPipeline"], "router": [module, "Router"]}
    index |= dict.fromkeys(experts, index[experts[0]])
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


if EXPERTS:  # in a student's folder
    MultiStudentPipeline = multi_student(Stock, EXPERTS)
