"""Images (or videos) from any diffusers pipeline, where sample i never depends on its neighbours in the batch.

Three things make a sample a function of (base seed, index) alone:

- its own CPU generator, seeded by a hash of the two, draws its initial noise;
- the same generator draws the fresh noise of stochastic schedulers, also under the many pipelines that do not hand
  their generators on to ``scheduler.step`` (`step_noise_from`);
- its prompt or label is a function of the index (`SampleConditions`).

So results do not change with the batch size, up to kernel rounding. The network evaluations are counted, not declared:
the denoisers of a pipeline are the networks that it is seen to call before its scheduler's steps, whatever their names.
"""

import contextlib
import hashlib
import inspect
import itertools
import logging
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fewstep.conditioning.item import digest
from fewstep.errors import UserError
from fewstep.eval.conditions import SampleConditions
from fewstep.export.step_noise import step_noise_from, step_replaced
from fewstep.recording.call.invocation import SUBJECT_ARGUMENTS
from fewstep.recording.call.plain import as_taken
from fewstep.recording.pipeline import find_scheduler, modules_of

logger = logging.getLogger(__name__)


class NonFiniteImagesError(UserError):
    """The pipeline returned NaN or infinity: the model diverged, or its scheduler cannot run this step count."""


@dataclass(frozen=True)
class Samples:
    """Some finished samples.

    images: uint8 (B, C, H, W), for videos (B, frames, C, H, W). evaluations: denoiser evaluations per sample, a
    guidance pass counted as one more. seconds: wall time of the pipeline's call.
    """

    indices: Sequence[int]
    images: Tensor
    evaluations: float
    seconds: float


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of sample `index` under base seed `seed`: 8 bytes of blake2b over both."""
    digest = hashlib.blake2b(f"sample:{seed}:{index}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))


def check_call(pipeline: Any, call: Mapping[str, Any]) -> None:
    """Raise UserError when the pipeline's call takes no such argument."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = sorted(set(call) - set(parameters))
    if unknown:
        raise UserError(f"{type(pipeline).__name__} takes no argument {', '.join(unknown)}")


@dataclass
class NetworkCalls:
    """What a pipeline was seen to call: rows by network, and the networks that were the last before a scheduler's step.

    Those are its denoisers. Text encoders come before them in the first step, a control network in each.
    """

    rows: Counter[nn.Module] = field(default_factory=Counter)
    denoisers: set[nn.Module] = field(default_factory=set)

    @property
    def evaluations(self) -> int:
        """The rows that the denoisers were run on, in all."""
        return sum(self.rows[network] for network in self.denoisers)


@contextlib.contextmanager
def count_evaluations(pipeline: Any) -> Iterator[NetworkCalls]:
    """Yields what is seen of the pipeline's networks while active."""
    seen = NetworkCalls()
    last: list[nn.Module] = []

    def note(network: nn.Module, _arguments: Any, output: Any) -> None:
        last[:] = [network]
        # Other networks answer in forms of their own, and nobody wants their rows.
        with contextlib.suppress(TypeError, LookupError):
            # Some transformers answer with a list, one tensor per row: len() is right for both.
            seen.rows[network] += len(output if isinstance(output, Tensor) else output[0])

    scheduler = getattr(pipeline, find_scheduler(pipeline))
    inner = scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        seen.denoisers.update(last)
        last.clear()
        return inner(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for network in dict.fromkeys(modules_of(pipeline).values()):
            stack.callback(network.register_forward_hook(note).remove)
        stack.enter_context(step_replaced(scheduler, step))
        yield seen


@contextlib.contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """The pipeline's own bar (one per batch) is switched off, and put back as it was."""
    before = dict(getattr(pipeline, "_progress_bar_config", None) or {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


@contextlib.contextmanager
def _own_global_rng(seed: int) -> Iterator[None]:
    """A fixed global RNG inside, the caller's own again outside: what still draws from it is at least repeatable."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % 2**63)
        yield


def run_pipeline(
    pipeline: Any, call: Mapping[str, Any], conditions: SampleConditions, indices: Sequence[int], *, seed: int
) -> Samples:
    """One call of the pipeline for the samples `indices`; of items one for each where it does not take several.

    call: the pipeline's keyword arguments; the condition, generators and output type are added here.
    Raises NonFiniteImagesError when the result holds NaN or infinity, UserError when the pipeline refuses the call.
    """
    if conditions.kind == "item" and len(indices) > 1 and not _takes_several(pipeline, call, conditions, indices, seed):
        return _joined([_called(pipeline, call, conditions, [index], seed) for index in indices])
    return _called(pipeline, call, conditions, indices, seed)


#: Pipelines that were seen to make of several items in one call what they make of each alone, and those that do not.
_SEVERAL: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _takes_several(
    pipeline: Any, call: Mapping[str, Any], conditions: SampleConditions, indices: Sequence[int], seed: int
) -> bool:
    """Whether lists of the items' arguments are an item each: seen by trying, since to some they are one item's.

    It is tried with two items of which every argument differs, as nothing else would show that each is heeded.
    """
    if pipeline not in _SEVERAL:
        digests = [{k: digest({k: v}) for k, v in item.arguments.items()} for item in conditions.items(indices)]
        others = (n for n, other in enumerate(digests) if all(other[k] != v for k, v in digests[0].items()))
        if (second := next(others, None)) is None:
            return False
        two = [indices[0], indices[second]]
        alone = [_called(pipeline, call, conditions, [index], seed).images[0] for index in two]
        try:
            together = _called(pipeline, call, conditions, two, seed).images
        except UserError as error:  # it takes one picture alone
            logger.debug("%s takes no list of items: %s", type(pipeline).__name__, error)
            together = torch.empty(0)
        same = len(together) == 2 and all(a.shape == b.shape for a, b in zip(together, alone, strict=True))
        _SEVERAL[pipeline] = same and _difference(together, torch.stack(alone)) <= 1
    return _SEVERAL[pipeline]


def _difference(one: Tensor, other: Tensor) -> int:
    """The largest, of 255 grey levels."""
    return int((one.int() - other.int()).abs().max())


#: What pipelines raise for a label, a size or an argument that they do not take, and for pictures in other numbers.
_REFUSALS: tuple[type[Exception], ...] = (IndexError, TypeError, ValueError)
_OF_PICTURES = (AttributeError, KeyError, RuntimeError)


def _called(
    pipeline: Any, call: Mapping[str, Any], conditions: SampleConditions, indices: Sequence[int], seed: int
) -> Samples:
    """One call of the pipeline, whose arguments are lists where it is for several items."""
    generators = [sample_generator(seed, index) for index in indices]
    arguments = as_taken(type(pipeline), call)  # a call comes from a file or a command line, where tuples are lists
    for name, value in call.items() if conditions.kind != "item" else ():
        # One text for all samples becomes one a sample: several pipelines do not broadcast a negative prompt.
        if isinstance(value, str) and name.startswith(("negative_prompt", "prompt_")):
            arguments[name] = [value] * len(indices)
    who, refusals = "", _REFUSALS
    if conditions.kind is None:
        arguments["batch_size"] = len(indices)
    elif conditions.kind == "item":
        items = conditions.items(indices)
        own = {name: [item.arguments[name] for item in items] for name in items[0].arguments}
        arguments |= own if len(items) > 1 else {name: value for name, (value,) in own.items()}
        who = f" for {items[0]}" if len(items) == 1 else f" for {items[0]} and {len(items) - 1} others"
        refusals += _OF_PICTURES
    else:
        arguments[SUBJECT_ARGUMENTS[conditions.kind]] = conditions.take(indices)
    single = conditions.kind == "item" and len(indices) == 1  # a list of one is not taken by all
    drawn = generators[0] if single else generators
    arguments |= {"generator": drawn, "output_type": "np"}
    with (
        torch.no_grad(),
        _quiet(pipeline),
        _own_global_rng(seed),
        step_noise_from(pipeline, generators),
        count_evaluations(pipeline) as seen,
    ):
        started = time.perf_counter()
        try:
            output = pipeline(**arguments)
        except torch.OutOfMemoryError:
            raise
        except refusals as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{type(pipeline).__name__} cannot be run{who} with {dict(call)}: {reason}") from error
        # "np" output lives on the host, so the device has finished when the call returns.
        seconds = time.perf_counter() - started
    if not seen.evaluations:
        kind = type(pipeline).__name__
        raise UserError(f"{kind} calls no network before its scheduler's steps: its evaluations cannot be counted")
    images = to_uint8(output.frames if "frames" in output else output.images)
    return Samples(indices, images, seen.evaluations / len(indices), seconds)


def _joined(samples: Sequence[Samples]) -> Samples:
    """Samples that were made one by one, as of one call."""
    shapes = {tuple(one.images.shape[1:]) for one in samples}
    if len(shapes) > 1:
        sizes = ", ".join(f"{shape[-1]}x{shape[-2]}" for shape in sorted(shapes))
        raise UserError(f"the samples of these items are of several sizes ({sizes}): give items of one size at a time")
    if len(samples) == 1:
        return samples[0]
    made = torch.cat([one.images for one in samples])
    mean = sum(one.evaluations for one in samples) / len(samples)
    return Samples([i for one in samples for i in one.indices], made, mean, sum(one.seconds for one in samples))


def generate(
    pipeline: Any,
    call: Mapping[str, Any],
    conditions: SampleConditions,
    indices: Sequence[int],
    *,
    seed: int,
    batch_size: int,
    description: str | None = None,
) -> Iterator[Samples]:
    """Samples `indices`, one batch after the other, with a progress bar named `description` (None: no bar).

    Items of other forms than their neighbours' are called apart, as a pipeline would bring them to one size.

    Yields instead of collecting, so that large images never pile up in memory.
    Raises UserError for an unknown argument in `call` or a batch size below 1, NonFiniteImagesError as `run_pipeline`.
    """
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, not {batch_size}")
    check_call(pipeline, call)
    with tqdm(total=len(indices), desc=description, disable=description is None, unit="sample", delay=2) as bar:
        for start in range(0, len(indices), batch_size):
            for _, run in itertools.groupby(indices[start : start + batch_size], conditions.form):
                samples = run_pipeline(pipeline, call, conditions, [*run], seed=seed)
                bar.update(len(samples.indices))
                yield samples


def to_uint8(images: Any) -> Tensor:
    """Float channels-last images in [0, 1] -> uint8 (B, C, H, W), or (B, frames, C, H, W) for videos.

    Rounds half up and clips (truncating would darken by half a grey level). Raises NonFiniteImagesError.
    """
    array = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    if not np.isfinite(array).all():
        raise NonFiniteImagesError("the images hold NaN or infinity")
    quantised = np.clip(np.floor(array * 255 + 0.5), 0, 255).astype(np.uint8)
    return torch.from_numpy(np.moveaxis(quantised, -1, -3).copy())
