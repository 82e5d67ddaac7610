"""Making noise-sample pairs of a teacher: as ``fewstep pairs`` does, and for a run that was given none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from fewstep.config.pairs import PairsConfig
from fewstep.data.fingerprint import teacher_digest
from fewstep.data.images import read_images
from fewstep.data.pairs import PairMaker, PairSettings, PairStream, StoredPairs
from fewstep.data.real import RealSamples
from fewstep.diffusion.intervals import TimedScale
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.errors import UserError
from fewstep.export.plan import teacher_shift
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.networks.roles import Role
from fewstep.programs.teacher import conditions_of, guidance_of, teacher_call
from fewstep.recording import Recording, record
from fewstep.recording.pipeline import name_of
from fewstep.teachers.loading import load_teacher
from fewstep.teachers.lora import fuse_teacher_lora, with_own_weights
from fewstep.training.distributed import join_launch

if TYPE_CHECKING:
    from fewstep.programs.distillation import Distillation

_ROWS = 256  # in a file of the pairs that a run makes for itself, or its batch where that is larger


def make_pairs(teacher: str | Path | DiffusionPipeline, **settings: Any) -> Path:
    """Make noise-sample pairs of a teacher's ODE, for ``fewstep distill rectified_flow --pairs``.

    Killed at any moment, it goes on with ``resume``. The pairs are bit-equal whatever the number of processes.

    Args:
        teacher: folder, hub id, embedded name, or a loaded pipeline.
        **settings: fields of :class:`PairsConfig`; ``out`` and ``num`` are needed.

    Returns:
        The folder.

    Raises:
        UserError: for everything that a user can mend.
    """
    pipeline = teacher if isinstance(teacher, DiffusionPipeline) else None
    name = str(teacher) if pipeline is None else name_of(pipeline)
    try:
        config = PairsConfig(teacher=name, **settings)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(PairsConfig))
        raise UserError(f"pairs have no such setting: {error}; there are: {known}") from error
    accelerator = join_launch(config.cpu)
    device = accelerator.device
    given = pipeline is not None
    pipeline = load_teacher(config.teacher, config.trust_remote_code) if pipeline is None else pipeline
    if config.teacher_lora is not None:
        pipeline = with_own_weights(pipeline) if given else pipeline
        fuse_teacher_lora(pipeline, config.teacher_lora)
    pipeline.to(device)
    recording = record(pipeline, **teacher_call(config))
    recording.prove()
    if recording.recipe.needs_next:
        raise UserError("this teacher's network is told the next time too, and no pairs can be made of it yet")
    conditions, negative = conditions_of(config, recording, device, progress=accelerator.is_main_process)
    real = None
    if config.data is not None:
        real = RealSamples(read_images(config.data), recording, conditions, device)
    scale = guidance_of(config, recording)
    settings_of_pairs = PairSettings(
        num=_count(config, real),
        steps=config.teacher_steps,
        solver=config.solver,
        shift=_own_shift(recording),
        guidance_scale=plain_scale(scale),
        seed=config.seed,
        batch_size=config.batch_size,
        shard_size=config.shard_size,
        dtype=config.dtype,
        mixed_precision=config.mixed_precision,
    )
    identity = teacher_digest(recording)
    teacher = make_roles(RoleSettings(mixed_precision=config.mixed_precision), recording, (), device)["teacher"]
    guided = GuidedDenoiser(teacher, negative.to(device=device) if negative is not None else None, scale)
    out = Path(config.out)
    independent = None if config.world is None else (config.rank, config.world)

    def begin(second: bool) -> PairMaker:
        # Who comes second finds the folder begun.
        resume = second or config.resume or independent is not None
        about = (out, recording, identity, guided, conditions, settings_of_pairs, device)
        return PairMaker(*about, real=real, resume=resume)

    _make_together(accelerator, begin, independent)
    return out


class RunPairs:
    """The pairs of a run: opened where they are given, else made by its own teacher.

    Args:
        distillation: the run.
    """

    def __init__(self, distillation: Distillation) -> None:
        self.distillation = distillation
        self.identity = teacher_digest(distillation.recording, distillation.encoders.digests)

    def make(self, teacher: Role, num: int, steps: int, solver: str, real: RealSamples | None = None) -> Path:
        """``OUT/pairs``, made by all processes of the run under its guidance; a killed run goes on with them.

        Args:
            teacher: the run's.
            num: how many pairs; of real samples at most as many as there are.
            steps: of the teacher's ODE.
            solver: of :data:`fewstep.diffusion.ode.SOLVERS`.
            real: real samples, whose noise is looked for instead; the folder is then ``OUT/inverted_pairs``.
        """
        run = self.distillation
        run.claim()
        size = run.config.batch_size
        settings = PairSettings(
            num=num if real is None else min(num, len(real.images)),
            steps=steps,
            solver=solver,
            shift=_own_shift(run.recording),
            guidance_scale=plain_scale(run.guidance_scale),
            seed=run.config.seed,
            batch_size=size,
            shard_size=size * max(1, _ROWS // size),
            mixed_precision=run.config.mixed_precision,
        )
        guided, out = run.guided(teacher), run.out / ("pairs" if real is None else "inverted_pairs")

        def begin(_second: bool) -> PairMaker:
            about = (out, run.recording, self.identity, guided, run.conditions, settings, run.device)
            return PairMaker(*about, real=real, resume=True)

        _make_together(run.accelerator, begin)
        return out

    def stream(self, folder: str | Path, inverted: str | Path | None, share: float, guided: bool = False) -> PairStream:
        """The pairs in these folders, in the run's keyed order.

        Args:
            folder: of pairs.
            inverted: folder of real images with their noise.
            share: of the latter in a batch.
            guided: whether the run guides its teacher beside them, by a scale that then has to be theirs.

        Raises:
            UserError: they do not fit the run, or are not complete, or damaged.
        """
        run = self.distillation
        mine = plain_scale(run.guidance_scale) if guided or run.config.guidance_scale is not None else None
        stored = self._stored(folder, "noise", mine)
        scale = stored.about["guidance_scale"] if mine is None else mine
        real = self._stored(inverted, "images", scale) if inverted is not None else None
        return PairStream(stored, run.conditions, run.device, real, share)

    def _stored(self, folder: str | Path, source: str, scale: float | list[float] | None) -> StoredPairs:
        stored = StoredPairs(folder, self.identity, self.distillation.conditions)
        if stored.about["source"] != source:
            raise UserError(f"the pairs in {folder} were made from {stored.about['source']}, and {source} is asked for")
        made = stored.about["guidance_scale"]
        if scale is not None and made != scale:
            raise UserError(
                f"the pairs in {folder} were made at guidance {made}, and here it is {scale}; "
                f"give --guidance_scale {made}, or make others"
            )
        return stored


def _make_together(
    accelerator: Accelerator, begin: Callable[[bool], PairMaker], independent: tuple[int, int] | None = None
) -> None:
    """Share the shards among the processes of a launch, or among processes that do not know of each other."""
    main = accelerator.is_main_process
    maker = begin(False) if main else None
    accelerator.wait_for_everyone()
    maker = maker or begin(True)
    rank, world = independent or (accelerator.process_index, accelerator.num_processes)
    count = sum(len(maker.shards.rows(number)) for number in maker.shards.numbers[rank::world])
    with tqdm(total=count, desc="pairs", unit="pair", disable=not main) as bar:
        maker.run(rank, world, bar.update)
    accelerator.wait_for_everyone()


def plain_scale(scale: float | TimedScale) -> float | list[float]:
    """A guidance scale as JSON holds it: one number, or one for each interval of the time."""
    return list(scale.scales) if isinstance(scale, TimedScale) else scale


def _count(config: PairsConfig, real: RealSamples | None) -> int:
    if real is None:
        return config.num
    images = len(real.images)
    if config.num is not None and config.num > images:
        raise UserError(f"--num {config.num} is more than the {images} images of --data {config.data}")
    return config.num or images


def _own_shift(recording: Recording) -> float:
    """The shift of a flow teacher's own time grid, else 1."""
    return teacher_shift(recording) if isinstance(recording.schedule, FlowSchedule) else 1.0
