"""`record(pipeline)`: learn from a pipeline's own `__call__` how its denoiser is called."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditioning import Conditioning, mark, remark
from fewstep.recording.codec import Codec, read_codec
from fewstep.recording.errors import RecordingError
from fewstep.recording.fit import fit_output, fit_sample, fit_times
from fewstep.recording.guided import (
    GuidanceReport,
    GuidedCall,
    embedded_paths,
    record_guided,
    switch_off,
    unguided_step,
    without_sample,
)
from fewstep.recording.invocation import Invocation, read_invocation
from fewstep.recording.observe import Step, Stub, find_scheduler, modules_of, observe
from fewstep.recording.proof import Proof, prove
from fewstep.recording.recipe import Recipe, dtype_name, network_dtype
from fewstep.recording.shake import shaken
from fewstep.schedule import FlowSchedule, NoiseSchedule, from_scheduler

# Two step counts, because on an even grid one count cannot tell the time from the next time. The network runs in every
# step of the short run and in a few of the long one, which shows many times, and some near 0, at no cost.
SHORT, LONG = 4, 101
_LONGEST = 1000
# What the classes of schedulers for consistency models and their relatives are called.
FEW_STEP_SCHEDULERS = ("LCM", "TCD", "CMStochastic")
_LIVE = frozenset({0, LONG // 2, LONG - 2, LONG - 1})


@dataclass(eq=False, repr=False)
class Recording:
    """How a pipeline calls its denoiser, learnt from the pipeline itself.

    Attributes:
        pipeline: the recorded pipeline, as it was.
        component: the denoiser's name in the pipeline.
        network: the denoiser.
        invocation: how the pipeline is called.
        recipe: how the network is called.
        schedule: alpha and sigma of the network's input.
        prediction_type: what the recipe's answer is ("epsilon", "v_prediction", "sample", "flow", "edm").
        guidance: what was seen of the pipeline's guidance.
        initial_noise_scale: what the pipeline multiplies unit noise with at its first step, in the network's input.
        off: the changes to the call that switch guidance off.
        guided: how the guided call is made, None without classifier-free guidance.
        marked: the conditioning of one sample, its leaves marked; the pattern of every other one.
        embedded: the arguments that follow an embedded guidance.
    """

    pipeline: Any
    component: str
    network: nn.Module
    invocation: Invocation
    recipe: Recipe
    schedule: NoiseSchedule
    prediction_type: str
    guidance: GuidanceReport
    initial_noise_scale: float
    off: dict[str, Any]
    guided: GuidedCall | None
    marked: dict[str, Any]
    embedded: set[str]
    _negative: Conditioning | None = None
    _codec: Codec | None = None
    proof: Proof | None = None

    def __repr__(self) -> str:
        return f"Recording({type(self.pipeline).__name__}, {self.component}, sample_shape={self.sample_shape})"

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The per-sample shape of x in the scheduler's space."""
        return self.recipe.sample_shape

    @property
    def call(self) -> dict[str, Any]:
        """The pipeline's keyword arguments that the recording holds for, prompts and labels apart."""
        return dict(self.invocation.call)

    @property
    def conditional(self) -> str | None:
        """ "prompt", "label" or None."""
        return self.invocation.conditional

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's weights."""
        return network_dtype(self.network)

    def condition_each(
        self, prompts: Sequence[str] | None = None, labels: Sequence[int] | None = None
    ) -> list[Conditioning]:
        """The conditioning of each prompt or label, each encoded alone, as users sample; runs the text encoders only.

        Raises:
            RecordingError: prompts for a pipeline that takes labels or nothing, and the like.
        """
        items = self._items(prompts, labels)
        if self.conditional is None:
            return [Conditioning(self.marked, 1)] * len(items)
        return [self._encode_text(item) for item in items]

    def condition(self, prompts: Sequence[str] | None = None, labels: Sequence[int] | None = None) -> Conditioning:
        """`condition_each` as one batch.

        Raises:
            RecordingError: as there, or the items' shapes differ; the message lists which.
        """
        items = self._items(prompts, labels)
        each = self.condition_each(prompts, labels)
        odd = [i for i, c in enumerate(each) if not Conditioning.compatible(each[0], c)]
        if odd:
            reason = Conditioning.mismatch(each[0], each[odd[0]])
            listed = ", ".join(repr(items[i]) for i in odd[:5]) + (", ..." if len(odd) > 5 else "")
            raise RecordingError(
                f"these cannot form one batch with {items[0]!r}: {listed} ({reason}); batch items of equal shapes "
                "(condition_each)"
            )
        return Conditioning.cat(each)

    def negative(self) -> Conditioning | None:
        """The negative conditioning that the pipeline itself uses (batch 1); None without classifier-free guidance."""
        return self._negative

    @property
    def codec(self) -> Codec:
        """The way between images and the network's space, read off from the pipeline when it is first wanted."""
        if self._codec is None:
            self._codec = read_codec(self)
        return self._codec

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), or videos (B, C, F, H, W), in [0, 1] -> x0 (B, *sample_shape).

        Raises:
            RecordingError: the pipeline's way to its images is not a reordering with a scale and an offset.
        """
        return self.codec.encode(images)

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (B, *sample_shape) -> images (B, C, H, W) or videos (B, C, F, H, W) in [0, 1], by its own tail."""
        return self.codec.decode(x0)

    def prove(self, seed: int = 0) -> Proof:
        """Compare own calls of the network with the pipeline's on fresh samples.

        Raises:
            RecordingError: they differ; the message says what was compared and by how much.
        """
        self.proof = prove(self, seed)
        return self.proof

    def summary(self) -> str:
        """What was found out, as a table for people."""
        sample = self.recipe.sample
        form = f"{'list of ' if sample.as_list else ''}{list(sample.shape)} per sample, {sample.dtype}"
        if sample.pad_axis:
            form += f", axis {sample.pad_axis} padded by {sample.pad[0]} and {sample.pad[1]} of {sample.fill:g}"
        rows = [
            ("pipeline", type(self.pipeline).__name__),
            ("component", f"{self.component} ({type(self.network).__name__}, {dtype_name(self.dtype)})"),
            ("sample", f"{sample.argument}: {form}; in the scheduler's space {list(self.sample_shape)}"),
            *(("time", rule.describe()) for rule in self.recipe.times),
            ("output", self.recipe.output.describe()),
            ("conditional on", self.conditional or "nothing"),
            *(("conditioning", text) for text in Conditioning(self.marked, 1).describe()),
            ("guidance", self.guidance.describe()),
            ("scheduler", type(getattr(self.pipeline, find_scheduler(self.pipeline))).__name__),
            ("schedule", f"{type(self.schedule).__name__}, prediction {self.prediction_type}"),
            ("initial noise", f"x{self.initial_noise_scale:g} in the network's input"),
            ("call", ", ".join(f"{k}={v!r}" for k, v in self.call.items()) or "no further arguments"),
        ]
        with contextlib.suppress(RecordingError):
            rows.append(("codec", self.codec.describe()))
        if self.proof is not None:
            rows += [("proof", text) for text in self.proof.describe()]
        return "\n".join(f"{name:<15}{text}" for name, text in rows)

    def _items(self, prompts: Sequence[str] | None, labels: Sequence[int] | None) -> list[Any]:
        kind = type(self.pipeline).__name__
        if prompts is not None and labels is not None:
            raise RecordingError("prompts and labels were given; a pipeline is conditioned on one of them")
        items = prompts if prompts is not None else labels
        if isinstance(items, str):
            raise RecordingError("prompts must be a list of strings, not one string")
        items = [] if items is None else list(items)
        if not items:
            if self.conditional is None:
                return [None]
            raise RecordingError(f"{kind} is conditioned on a {self.conditional}; give at least one")
        if self.conditional is None:
            raise RecordingError(f"{kind} is conditioned on nothing: it takes neither prompts nor labels")
        if prompts is not None and self.conditional == "label":
            raise RecordingError(f"{kind} takes class labels, not prompts")
        if labels is not None and self.conditional == "prompt":
            raise RecordingError(f"{kind} takes prompts, not class labels")
        return items

    def _encode_text(self, item: Any) -> Conditioning:
        call = self.invocation.arguments([item], SHORT, **self.off)
        arguments = without_sample(observe(self.pipeline, call, before=self.component).pending[-1], self.recipe)
        try:
            return remark(arguments, self.marked, 1)
        except ValueError:
            # This item has other arguments than the recorded one (a mask where that had None): mark it by itself.
            call = self.invocation.arguments([item, item], SHORT, **self.off)
            two = without_sample(observe(self.pipeline, call, before=self.component).pending[-1], self.recipe)
            return Conditioning(_marked(self.component, arguments, two), 1)


def record(pipeline: Any, **call: Any) -> Recording:
    """Run `pipeline(**call)` for a few steps under observation and learn how it calls its denoiser.

    The pipeline is left exactly as found. The guidance in `call` matters only where it is embedded in the network;
    everything is recorded with classifier-free guidance off, and the negative beside it.

    Args:
        pipeline: a diffusers pipeline.
        call: keyword arguments of the pipeline's call (prompt or labels, height, width, num_frames, ...).

    Raises:
        RecordingError: the pipeline cannot be recorded; one line says what was seen and what to do.
    """
    refuse_offloaded(pipeline)
    invocation = read_invocation(pipeline, call)
    refuse_few_step(pipeline)
    try:
        schedule, prediction_type = from_scheduler(getattr(pipeline, find_scheduler(pipeline)))
    except ValueError as error:
        raise RecordingError(str(error)) from error
    off, component = switch_off(pipeline, invocation)
    network = modules_of(pipeline)[component]

    runs = _unguided_runs(pipeline, invocation, off, component)
    _check_walk(pipeline, schedule, runs[1])
    two = _two_samples(pipeline, invocation, off, component)
    sample = fit_sample(component, [step for run in runs for step in run])
    times = fit_times(component, sample.argument, runs, two)
    steps = _live_steps(runs)
    if any(step.model_output.abs().max() == 0 for step in steps):
        # Layers that are still zero hide the output's sign and half.
        with shaken(network):
            steps = _live_steps(_unguided_runs(pipeline, invocation, off, component))
    output = fit_output(component, steps)
    if output.relation == "velocity":
        output = fit_output(component, steps + _near_zero(pipeline, invocation, off, component, steps))
    first = runs[0][0]
    shape = tuple(first.network_input.shape[1:])
    recipe = Recipe(component, shape, sample, times, output, dtype_name(network_dtype(network)))

    one = without_sample(first.calls[-1], recipe)
    two = {name: value for name, value in two.items() if name in one}
    marked = _marked(component, one, two)
    unguided = Conditioning(marked, 1)
    embedded = embedded_paths(pipeline, invocation, off, recipe)
    report, negative, guided = record_guided(pipeline, invocation, off, recipe, network, marked, unguided, embedded)
    return Recording(
        pipeline=pipeline,
        component=component,
        network=network,
        invocation=invocation,
        recipe=recipe,
        schedule=schedule,
        prediction_type=prediction_type,
        guidance=report,
        initial_noise_scale=_initial_noise_scale(pipeline, invocation, off, component),
        off=off,
        guided=guided,
        marked=marked,
        embedded=embedded,
        _negative=negative,
    )


def refuse_few_step(pipeline: Any) -> None:
    """Raise for pipelines whose scheduler belongs to a few-step student: their network is no teacher."""
    scheduler = type(getattr(pipeline, find_scheduler(pipeline))).__name__
    if any(word in scheduler for word in FEW_STEP_SCHEDULERS):
        raise RecordingError(
            f"{type(pipeline).__name__} with {scheduler} is a few-step student already; "
            "record its teacher, or give it the scheduler of a many-step model"
        )


def refuse_offloaded(pipeline: Any) -> None:
    """Raise for pipelines whose networks are moved or replaced while they run."""
    name = type(pipeline).__name__
    if not hasattr(pipeline, "components") or not callable(pipeline):
        raise RecordingError(f"{name} is not a diffusers pipeline; load one with DiffusionPipeline.from_pretrained")
    hooked = [key for key, module in modules_of(pipeline).items() if hasattr(module, "_hf_hook")]
    if hooked or getattr(pipeline, "hf_device_map", None) or getattr(pipeline, "_all_hooks", None):
        raise RecordingError(
            f"{name} is offloaded ({', '.join(hooked) or 'device map'}); load it without offloading or a device map"
        )


def _unguided_runs(pipeline: Any, invocation: Invocation, off: dict[str, Any], component: str) -> list[list[Step]]:
    """The steps of the short and the long run, checked to hold one network call each."""
    short = observe(pipeline, invocation.arguments([invocation.item], SHORT, **off), steps=SHORT).steps
    _check_loop(pipeline, component, short)
    stub = Stub(component, short[0].calls[-1].output, _LIVE)
    long = observe(pipeline, invocation.arguments([invocation.item], LONG, **off), steps=LONG, stub=stub).steps
    _check_loop(pipeline, component, long)
    return [short, long]


def _near_zero(
    pipeline: Any, invocation: Invocation, off: dict[str, Any], component: str, steps: list[Step]
) -> list[Step]:
    """The last steps of a very long run, for what only the smallest times show."""
    stub = Stub(component, steps[0].calls[-1].output, frozenset(range(_LONGEST - 2, _LONGEST)))
    call = invocation.arguments([invocation.item], _LONGEST, **off)
    return observe(pipeline, call, steps=_LONGEST, stub=stub).steps[-2:]


def _live_steps(runs: list[list[Step]]) -> list[Step]:
    """The steps in which the network ran."""
    return runs[0] + [step for i, step in enumerate(runs[1]) if i in _LIVE]


def _check_loop(pipeline: Any, component: str, steps: list[Step]) -> None:
    kind = type(pipeline).__name__
    if len(steps) < 2:
        raise RecordingError(f"{kind} made {len(steps)} steps; a pipeline without a loop cannot be distilled")
    others = sorted({call.component for step in steps[1:] for call in step.calls} - {component})
    if others:
        raise RecordingError(
            f"the loop of {kind} calls {', '.join(others)} beside {component}; pipelines with several denoisers or a "
            "control network cannot be distilled yet"
        )
    if not all(unguided_step(step, component) for step in steps):
        raise RecordingError(
            f"{kind} does not call {component} exactly once in every step with guidance off; it cannot be recorded"
        )


def _check_walk(pipeline: Any, schedule: NoiseSchedule, steps: list[Step]) -> None:
    """The scheduler walks from noise to data in the schedule's time, and its timesteps name its noise levels."""
    scheduler = type(getattr(pipeline, find_scheduler(pipeline))).__name__
    times = schedule.time(torch.tensor([step.timestep for step in steps], dtype=torch.float64))
    if not (times.isfinite().all() and times[0] > times[-1]):
        raise RecordingError(
            f"{scheduler} walks from t={times[0]:.3g} to t={times[-1]:.3g}, from data to noise as fewstep reads it "
            "(inverted sigmas?); such a schedule cannot be trained on"
        )
    if not isinstance(schedule, FlowSchedule):
        return
    for step, t in zip(steps, times.tolist(), strict=True):
        # Integer timesteps are allowed: they are off by less than one.
        if step.sigma is not None and abs(step.sigma - t) * schedule.timestep_scale > 1.01:
            raise RecordingError(
                f"{scheduler} gives the network the timestep {step.timestep:g} at the noise level {step.sigma:.4g}; "
                "fewstep trains flow models whose timestep names the noise level"
            )


def _two_samples(pipeline: Any, invocation: Invocation, off: dict[str, Any], component: str) -> dict[str, Any]:
    call = invocation.arguments([invocation.item] * 2, SHORT, **off)
    return observe(pipeline, call, before=component).pending[-1].arguments


def _marked(component: str, one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    try:
        return mark(one, two)
    except ValueError as error:
        raise RecordingError(
            f"how the conditioning of {component} depends on the batch was not understood: {error}"
        ) from error


def _initial_noise_scale(pipeline: Any, invocation: Invocation, off: dict[str, Any], component: str) -> float:
    """The scheduler's init_noise_sigma, as set for this run, times what scale_model_input makes of the first sample."""
    schedulers: list[Any] = []
    call = invocation.arguments([invocation.item], SHORT, **off)
    step = observe(pipeline, call, steps=1, set_up=schedulers.append).steps[0]
    ratio = step.network_input.double().norm() / step.sample.double().norm()
    return float(getattr(schedulers[0], "init_noise_sigma", 1.0)) * float(ratio)
