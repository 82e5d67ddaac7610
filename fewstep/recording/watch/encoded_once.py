"""Each picture through an autoencoder once, however often a pipeline is run with it: nothing else takes as long."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from fewstep.conditioning.item import digest
from fewstep.recording.pipeline import find_decoder
from fewstep.recording.watch.hooks import method_replaced


@contextlib.contextmanager
def encoded_once(pipeline: Any, known: dict[str, Any] | None = None) -> Iterator[None]:
    """Inside, the pipeline's autoencoder remembers what it made of each input.

    A distribution is remembered, not what was drawn from it: that follows the seed as ever.

    Args:
        pipeline: a diffusers pipeline.
        known: what is remembered, also from one time to the next, as long as the weights are what they were; None:
            nothing beyond this time.
    """
    name = find_decoder(pipeline)
    if name is None:
        yield
        return
    module = getattr(pipeline, name)
    with method_replaced(module, "encode", _remembering(module, {} if known is None else known)):
        yield


def _remembering(module: Any, known: dict[str, Any]) -> Callable[..., Any]:
    encode = module.encode
    # Whatever changes weights puts others in their place, or counts as another version of them.
    weights = hash(tuple((weight.untyped_storage()._cdata, weight._version) for weight in module.parameters()))

    # functools.wraps keeps the signature visible.
    @functools.wraps(encode)
    def remembered(*args: Any, **kwargs: Any) -> Any:
        told = [*args, *kwargs.values()]
        if not all(value is None or isinstance(value, Tensor | bool | int | float | str) for value in told):
            return encode(*args, **kwargs)
        key = f"{digest({'args': list(args), **kwargs})} {weights}"
        if key not in known:
            known[key] = encode(*args, **kwargs)
        return copy.deepcopy(known[key])  # pipelines may write into what they are given

    return remembered
