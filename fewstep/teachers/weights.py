"""Loading a pipeline whose files fit its networks, to the last key.

diffusers and transformers only log which weights a file lacks, and start those at random; a teacher or a student with a
random text encoder samples without an error, and badly. So each loader is asked what it found, and what does not fit is
refused by name. It is the loaders' own word, which knows of tied weights, of keys that were renamed from version to
version, and of those that a class says it leaves out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import update_wrapper
from itertools import accumulate, chain
from pathlib import Path
from threading import get_ident
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from fewstep.errors import UserError, first_line
from fewstep.reading import read_json
from fewstep.recording.pipeline import is_quantized

_NAMED = 3  # keys that a message names of each kind


class WeightsError(UserError):
    """The files of a pipeline do not hold the weights that its networks have."""


@dataclass
class Loading:
    """What the loader of one network found.

    Attributes:
        part: the network's name in its pipeline.
        kind: its class.
        missing: weights that no file holds.
        unexpected: keys of the files that the network does not have.
        shapes: keys of another shape, each with the file's and the network's.
    """

    part: str
    kind: type
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)

    def misfit(self) -> str | None:
        """What does not fit, in words; None where everything does."""
        kinds = {"missing": self.missing, "of another shape": self.shapes, "not known to it": self.unexpected}
        found = [f"{_some(keys)} {'are' if len(keys) > 1 else 'is'} {what}" for what, keys in kinds.items() if keys]
        if not found:
            return None
        library = self.kind.__module__.partition(".")[0]
        kind = f"{self.kind.__name__} of {library} {_version(library)}"
        return f"the files of its {self.part} do not fit {kind}: {'; '.join(found)}"


def load_pipeline(
    place: str | Path, kind: type[DiffusionPipeline] = DiffusionPipeline, /, **words: Any
) -> DiffusionPipeline:
    """``from_pretrained`` of a pipeline class, which refuses what it would start at random or leave out.

    A part that a folder was saved without (Stable Diffusion 3 without its T5) is absent here too; diffusers loads such
    a folder only where it is told ``text_encoder_3=None``.

    Args:
        place: a folder or a hub id.
        kind: the class; default the one that the files name.
        words: of ``from_pretrained``. Parts that are given are not looked at.

    Raises:
        WeightsError: a file lacks weights of its network, has others than it, or some of another shape.
    """
    with noted_loading() as loadings:
        pipeline = kind.from_pretrained(place, **{**_absent_parts(Path(place), kind), **words})
    misfits = [misfit for loading in loadings if (misfit := loading.misfit()) is not None]
    if misfits:
        raise WeightsError(
            f"{'; '.join(misfits)}. It would run with random weights, or without some: fetch the files anew, or "
            "install the version that wrote them (its config.json says which). From Python, a pipeline that is loaded "
            "already is taken as it is"
        )
    return pipeline


def _absent_parts(folder: Path, kind: type[DiffusionPipeline]) -> dict[str, None]:
    """The parts that a pipeline's folder names and does not have, those apart that another class does not know."""
    try:
        index = dict(read_json(folder / "model_index.json"))
    except (OSError, ValueError, TypeError):  # a hub id, or for from_pretrained to say what is wrong
        return {}
    known = index if kind is DiffusionPipeline else inspect.signature(kind).parameters
    return {name: None for name, entry in index.items() if entry == [None, None] and name in known}


@contextmanager
def noted_loading() -> Iterator[list[Loading]]:
    """Inside, what this thread loads by ``from_pretrained`` of either library is noted in the list."""
    notes: list[Loading] = []
    thread = get_ident()
    bases: tuple[Any, ...] = (ModelMixin, PreTrainedModel)  # types are not made for methods that are exchanged
    before = {base: vars(base)["from_pretrained"] for base in bases}

    def note(loading: Loading) -> None:
        if get_ident() == thread:
            notes.append(loading)

    for base, method in before.items():
        base.from_pretrained = classmethod(_noting(method.__func__, note))
    try:
        yield notes
    finally:
        for base, method in before.items():
            base.from_pretrained = method


def _noting(load: Callable[..., Any], note: Callable[[Loading], None]) -> Callable[..., Any]:
    """``from_pretrained``, which also tells what it found; a caller gets what it asked for."""

    def from_pretrained(cls: type, place: Any, *args: Any, **words: Any) -> Any:
        asked = words.pop("output_loading_info", False)
        if issubclass(cls, PreTrainedModel):
            words.setdefault("ignore_mismatched_sizes", True)  # else its error names no key
        part = Path(place).name
        try:
            answer = load(cls, place, *args, output_loading_info=True, **words)
        except (ValueError, RuntimeError) as error:  # diffusers' words for another shape name the key, and not the part
            said, _, _ = first_line(error).partition(" If you want")  # arguments that users of a command cannot give
            raise WeightsError(f"its {part} does not load: {said}") from error
        if not isinstance(answer, tuple):  # diffusers' FlashPack files, which are read whole or not at all
            return answer
        network, info = answer
        note(_found(network, info, part))
        return (network, info) if asked else network

    return update_wrapper(from_pretrained, load)


def _found(network: nn.Module, info: dict[str, Any], part: str) -> Loading:
    known = set(network.state_dict())
    # Tables such as position_ids were saved by older versions and are computed by newer ones.
    computed = {name for name, _ in network.named_buffers()} - known
    quantized = is_quantized(network)

    def harmless(key: str) -> bool:
        # One of the two may have the prefix that base models once had.
        if any(f".{key}".endswith(f".{name}") or name.endswith(f".{key}") for name in computed):
            return True
        # Beside a quantised weight lie the scales that belong to it: "proj.weight.absmax", "proj.SCB".
        above = list(accumulate(key.split("."), "{}.{}".format))[:-1]
        return quantized and bool(above) and (f"{above[-1]}.weight" in known or not known.isdisjoint(above))

    return Loading(
        part,
        type(network),
        missing=sorted({*info["missing_keys"], *left_out(network)}),
        unexpected=sorted(key for key in info["unexpected_keys"] if not harmless(key)),
        shapes=sorted(
            f"{key} {_shape(of_file)} instead of {_shape(own)}" for key, of_file, own in info["mismatched_keys"]
        ),
    )


def left_out(network: nn.Module) -> list[str]:
    """Weights that never came: an index may name a key that its file lacks."""
    # What is offloaded is elsewhere by intent.
    if any(hasattr(module, "_hf_hook") for module in network.modules()):
        return []
    tensors = chain(network.named_parameters(), network.named_buffers())
    return [name for name, tensor in tensors if tensor.is_meta]


def _shape(size: Any) -> str:
    return "x".join(map(str, size)) or "scalar"


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:_NAMED])
    return shown if len(keys) <= _NAMED else f"{shown} and {len(keys) - _NAMED} more"


def _version(library: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:  # code of a folder's own
        return "none"
