"""Freeing the text encoders: once everything is encoded, training needs their memory and not them.

What still runs the pipeline, the decoding of a sample grid and the checks at export, does so for the recording's own
prompt only, of items for one of each size. What the encoders answer to that is kept; asked again, they repeat it, and
their weights can go. They are part of a student's pipeline, so they are loaded again for its export.
"""

from __future__ import annotations

import functools
import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.fingerprint import part_digest
from fewstep.errors import UserError
from fewstep.recording import Recording
from fewstep.recording.errors import RecordingError
from fewstep.recording.loop.call_parts import equal
from fewstep.recording.pipeline import find_decoder, modules_of
from fewstep.recording.watch.hooks import hooked
from fewstep.recording.watch.observation import Stub
from fewstep.recording.watch.observe import observe

_STEPS = 2


class Encoders:
    """The parts of a pipeline that run before its network only, and whether their weights are there.

    Args:
        recording: of the pipeline.
        call: the student's call, whose answers are kept too.
        reload: gives a pipeline with the same parts once more, when it is told the parts that are there; None: the
            weights move to this machine's memory instead, which frees that of a GPU.

    Attributes:
        digests: by name of the parts whose weights are away, as :func:`fewstep.data.fingerprint.part_digest` has them.
    """

    def __init__(
        self,
        recording: Recording,
        call: dict[str, Any],
        reload: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.recording, self.call, self.reload = recording, call, reload
        self.digests: dict[str, str] = {}
        self._held: dict[str, dict[str, Tensor]] = {}

    @contextmanager
    def away(self, say: Callable[[str], None]) -> Iterator[None]:
        """Inside they are freed, which ``say`` is told; a pipeline that is the caller's own gets them back."""
        say(self.free())
        try:
            yield
        finally:
            if self.reload is None:
                self.restore()

    def free(self) -> str:
        """Keep the answers, let go of the weights. Returns what was freed, or why not, in one line; "" for nothing."""
        modules = modules_of(self.recording.pipeline)
        parts = {name: modules[name] for name in self._only_before_the_network() if _plain_weights(modules[name])}
        devices = {parameter.device.type for part in parts.values() for parameter in part.parameters()}
        if not parts or (self.reload is None and devices == {"cpu"}):
            return ""
        with ExitStack() as stack:
            answers = {name: stack.enter_context(_noted(part)) for name, part in parts.items()}
            before = self._told()
        size = sum(p.numel() * p.element_size() for part in parts.values() for p in part.parameters())
        for name, part in parts.items():
            self.digests[name] = part_digest(part)
            if self.reload is None:
                self._held[name] = {key: value.detach().cpu() for key, value in part.named_parameters()}
            _empty(part, answers[name])
        try:
            why = "" if equal(before, self._told()) else "they do not repeat their answers"
        except RecordingError as error:  # the pipeline uses more of it than its call
            why = str(error)
        if why:
            self.restore()
            return f"{', '.join(parts)} stay in memory: {why}"
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return f"everything is encoded: freed {', '.join(parts)} ({size / 1e6:,.1f} MB)"

    def restore(self) -> None:
        """Bring the weights back; nothing happens where they are there.

        Raises:
            UserError: the teacher cannot be loaded again, or is another one by now.
        """
        pipeline = self.recording.pipeline
        if gone := self.digests.keys() - self._held.keys():
            assert self.reload is not None  # else all of them would be held
            others = {name: part for name, part in pipeline.components.items() if name not in gone}
            fresh = self.reload(others)
            for name in sorted(gone):
                if part_digest(getattr(fresh, name)) != self.digests[name]:
                    raise UserError(f"the teacher's {name} has changed since the run began; put it back, then --resume")
                self._held[name] = dict(getattr(fresh, name).named_parameters())
        for name in self.digests:
            part = getattr(pipeline, name)
            for key, parameter in part.named_parameters():
                parameter.data = self._held[name][key].detach().to(parameter.device)
            part.__dict__.pop("forward", None)
        self.digests, self._held = {}, {}

    def _only_before_the_network(self) -> list[str]:
        """The parts of which a module runs before the network's first call, and none after it."""
        recording = self.recording
        pipeline = recording.pipeline
        others = {*recording.components, find_decoder(pipeline)}
        parts = {name: module for name, module in modules_of(pipeline).items() if name not in others}
        early: set[str] = set()
        late: set[str] = set()
        begun: list[bool] = []

        def begin(*_: Any) -> None:
            begun.append(True)

        def note(path: str, *_: Any) -> None:
            (late if begun else early).add(path.partition(".")[0])

        modules = {f"{name}.{path}": m for name, part in parts.items() for path, m in part.named_modules()}
        with hooked(recording.networks, before=begin), hooked(modules, before=note):
            output = recording.subject.run(_STEPS, steps=1).steps[0].calls[-1].output
            begun.clear()
            stub = Stub(recording.components, output)
            recording.subject.run(_STEPS, stub=stub, stop_at_decode=find_decoder(pipeline) is not None)
        return sorted(early - late)

    def _calls(self) -> list[dict[str, Any]]:
        """The calls that are still made: the teacher's without guidance, at each size of samples, and the student's."""
        invocation, steps = self.recording.invocation, {"num_inference_steps": _STEPS}
        dropped = self.recording.call.keys() - self.call.keys()
        student = {**invocation.arguments([invocation.item], _STEPS), **self.call, **steps}
        calls = []
        for one in (self.recording, *self.recording.sizes):
            calls.append(one.subject.call(_STEPS))
            if one.between is not None:  # a pinned sample is decoded with other pictures
                calls.append(one.subject.call(_STEPS, [one.between.bare]))
        return [
            *calls,
            {name: value for name, value in student.items() if name not in dropped},
        ]

    def _told(self) -> list[dict[str, Any]]:
        """What the network is told in each of the calls."""
        pipeline, component = self.recording.pipeline, self.recording.component
        return [observe(pipeline, call, before=component).pending[-1].arguments for call in self._calls()]


@contextmanager
def _noted(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Inside, what the module answers is kept, by what it is asked; on the CPU."""
    answers: dict[str, Any] = {}

    def note(_name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        answers[_question(args, kwargs)] = _moved(output, torch.device("cpu"))

    with hooked({"": module}, after=note):
        yield answers


def _empty(module: nn.Module, answers: dict[str, Any]) -> None:
    """Take the weights out of a module, dtypes and devices apart, and let it repeat its answers."""
    forward = type(module).forward
    device = next(module.parameters()).device

    @functools.wraps(forward)
    def repeat(*args: Any, **kwargs: Any) -> Any:
        answer = answers.get(_question(args, kwargs))
        if answer is None:
            raise RuntimeError(f"this {type(module).__name__} is freed, and was never asked this before")
        return _moved(answer, device)

    for parameter in module.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    repeat.__wrapped__ = functools.partial(forward, module)  # the signature without self
    module.forward = repeat


def _plain_weights(module: nn.Module) -> bool:
    """Whether a module has weights, and all are ordinary ones: a quantised one keeps more than their data."""
    parameters = list(module.parameters())
    return bool(parameters) and all(type(parameter) is nn.Parameter for parameter in parameters)


def _question(args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """What a module is asked, as a digest."""
    state = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            state.update(f"{value.dtype}{list(value.shape)}".encode())
            state.update(value.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for name in sorted(value, key=str):
                state.update(str(name).encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            state.update(f"{len(value)}".encode())
            for child in value:
                add(child)
        else:
            state.update(repr(value).encode())

    add(list(args))
    add(kwargs)
    return state.hexdigest()


def _moved(value: Any, device: torch.device) -> Any:
    """A copy of an answer with every tensor on `device`; output classes stay what they are."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if type(value) in (list, tuple):
        return type(value)(_moved(child, device) for child in value)
    if isinstance(value, dict):
        moved = {name: _moved(child, device) for name, child in value.items()}
        return moved if type(value) is dict else type(value)(**moved)
    return value
