"""The pipeline classes that diffusers has for a student's family beside its own, and one of them made of its parts.

A family is what shares a folder of diffusers with the student's class, and the ControlNet classes that carry its name.
What takes no picture is no relative: it is another text-to-image pipeline of other weights.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import sys
import typing
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import nn

from fewstep.export.errors import ExportError
from fewstep.recording.pipeline import modules_of

#: The arguments of a call by which a pipeline is given pictures, in diffusers' words.
PICTURES = ("image", "video", "control_image")
#: The part that a ControlNet pipeline has and its student does not.
CONTROL = "controlnet"
# The package by which some pipelines mend the letters of a prompt.
_TEXT_REPAIR = "ftfy"


def related_names(stock: type) -> list[str]:
    """The names of the pipeline classes that may be relatives of a class of diffusers; none of them is imported yet.

    Args:
        stock: the student's pipeline class.
    """
    package = importlib.import_module(stock.__module__.rpartition(".")[0])
    control = f"{stock.__name__.removesuffix('Pipeline')}ControlNet"
    near = [name for name in dir(package) if not name.startswith("_")]
    far = [name for name in dir(diffusers) if name.startswith(control)]
    names = dict.fromkeys(name for name in (*near, *far) if name.endswith("Pipeline") and name != stock.__name__)
    # AutoPipeline's own first choice is the plain one, which has the shorter name.
    return sorted(names, key=lambda name: (len(name), name))


def related_classes(stock: type) -> Iterator[type]:
    """The relatives that take a picture, those apart that need packages which are not installed."""
    package = importlib.import_module(stock.__module__.rpartition(".")[0])
    for name in related_names(stock):
        try:
            found = getattr(diffusers, name, None) or getattr(package, name)
        except (ImportError, RuntimeError, AttributeError):  # how diffusers says that a file of its own does not import
            continue
        is_stand_in = hasattr(found, "_backends")  # for a class whose packages are missing
        if not inspect.isclass(found) or is_stand_in or ".deprecated." in found.__module__:
            continue
        if not set(PICTURES).isdisjoint(parameters(found)):
            yield found


def parameters(pipeline_class: type) -> Mapping[str, inspect.Parameter]:
    """What a pipeline class's call takes, itself apart."""
    named = dict(inspect.signature(pipeline_class.__call__).parameters)
    named.pop("self", None)
    return named


def missing_package(pipeline_class: type) -> str | None:
    """The package that a class's file names and could not import; None where there is none.

    diffusers imports ftfy where it is installed, and some of its pipelines call it where it is not.
    """
    module = sys.modules[pipeline_class.__module__]
    return None if hasattr(module, _TEXT_REPAIR) or not _names_unguarded(pipeline_class) else _TEXT_REPAIR


@contextlib.contextmanager
def text_unrepaired(pipeline_class: type) -> Iterator[None]:
    """Inside, a class whose file could not import ftfy leaves texts as they are; a walk is about pictures."""
    module = sys.modules[pipeline_class.__module__]
    if hasattr(module, _TEXT_REPAIR):
        yield
        return
    setattr(module, _TEXT_REPAIR, SimpleNamespace(fix_text=lambda text: text))
    try:
        yield
    finally:
        delattr(module, _TEXT_REPAIR)


def _names_unguarded(pipeline_class: type) -> bool:
    """Whether the file's own cleaning of a text calls the package whether or not it is there."""
    clean = getattr(sys.modules[pipeline_class.__module__], "basic_clean", None)
    names = () if clean is None else clean.__code__.co_names
    return _TEXT_REPAIR in names and f"is_{_TEXT_REPAIR}_available" not in names


def takes_control(pipeline_class: type) -> bool:
    """Whether a pipeline class has a control network beside the student's."""
    return CONTROL in inspect.signature(pipeline_class).parameters


def made_of(pipeline: Any, pipeline_class: Any) -> Any:
    """A pipeline of a related class with the same parts, and a control network without weights where it has one.

    Args:
        pipeline: the student's.
        pipeline_class: the relative.

    Raises:
        ExportError: it needs a part that the student does not have, or has of another class.
    """
    components, types = pipeline.components, _types(pipeline_class)
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(pipeline_class).parameters.items():
        wanted, optional = types.get(name, ()), parameter.default is not inspect.Parameter.empty
        if name == CONTROL:
            arguments[name] = _control_network(pipeline, wanted)
        elif name in components:
            part = components[name]
            if isinstance(part, nn.Module) and isinstance(part, diffusers.ModelMixin) and not _fits(part, wanted):
                raise ExportError(f"its {name} is a {_named(wanted)}, and the student's is a {type(part).__name__}")
            arguments[name] = part
        elif name in pipeline.config:
            arguments[name] = pipeline.config[name]
        elif not optional:
            raise ExportError(f"it has a {name}, and the student has none")
    made = pipeline_class(**arguments)
    made.set_progress_bar_config(disable=True)
    return made


def _types(pipeline_class: Any) -> dict[str, tuple[type, ...]]:
    """The classes that each part may have, as the constructor's annotations say; those that cannot be read are left."""
    try:
        hints = typing.get_type_hints(pipeline_class.__init__)
    except NameError:  # an annotation whose class is imported for type checkers alone
        hints = pipeline_class.__init__.__annotations__
    return {name: tuple(_classes(hint)) for name, hint in hints.items()}


def _classes(hint: Any) -> Iterator[type]:
    if inspect.isclass(hint):
        yield hint
    for inner in typing.get_args(hint):
        yield from _classes(inner)


def _fits(part: nn.Module, wanted: tuple[type, ...]) -> bool:
    return not wanted or isinstance(part, wanted)


def _named(wanted: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in wanted)


def _control_network(pipeline: Any, wanted: tuple[type, ...]) -> nn.Module:
    """A control network of the family, of the configuration that fits the student's network, and without weights.

    What it computes is never asked; pipelines look at its class, its configuration, its dtype and which layers it has.
    """
    networks = modules_of(pipeline)
    component = "unet" if "unet" in networks else "transformer"
    if component in networks:
        for kind in wanted:
            if issubclass(kind, nn.Module) and (made := _made_from(kind, networks[component])) is not None:
                return _without_weights(made, networks[component])
    raise ExportError(f"diffusers makes no {_named(wanted) or CONTROL} from the student's network")


def _made_from(kind: Any, network: Any) -> nn.Module | None:
    """Made as diffusers makes it from a network, or by its configuration; on the meta device weights take no room."""
    make = getattr(kind, "from_unet", None) or getattr(kind, "from_transformer", None)
    named = {} if make is None else inspect.signature(make).parameters
    flags = {name: False for name in named if name.startswith("load_weights_from")}
    twin = copy.copy(network)  # some write into the configuration that they read
    twin._internal_dict = copy.deepcopy(network._internal_dict)
    try:
        with torch.device("meta"):
            return make(twin, **flags) if make is not None and flags else kind.from_config(dict(network.config))
    except (TypeError, ValueError, AttributeError):  # it asks for what the network's configuration does not say
        return None


def _without_weights(made: nn.Module, network: nn.Module) -> nn.Module:
    """Empty weights on the network's device instead of those on the meta device, where a pipeline would move to."""
    own = next(network.parameters())
    for module in made.modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.empty(0, dtype=own.dtype, device=own.device)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(0, dtype=buffer.dtype, device=own.device))
    return made
