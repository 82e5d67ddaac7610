"""Making noise-sample pairs of a teacher: as ``fewstep pairs`` does, and for a run that was given none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from fewstep.config.pairs import PairsConfig, PairsWanted
from fewstep.data.captioned import captioned
from fewstep.data.contents import all_of
from fewstep.data.durable import nothing_left
from fewstep.data.fingerprint import teacher_digest
from fewstep.data.latents import data_contents, read_data, refuse_unusable
from fewstep.data.pair_stream import PairStream, numbers_used, sized_numbers_used
from fewstep.data.pairs import FORMAT, PairMaker, PairSettings, StoredPairs
from fewstep.data.real import RealSamples
from fewstep.data.shard_index import INDEX_FOLDER
from fewstep.data.shards import begun_about
from fewstep.diffusion.draws import RESPONSE_STEP, Draws
from fewstep.diffusion.scales import plain_scale
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.errors import UserError
from fewstep.export.walk.teacher_shift import teacher_shift
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.networks.roles import Role
from fewstep.programs.teacher import (
    TeacherSettings,
    conditions_of,
    open_teacher,
    quantized_network,
    refuse_guided_alike,
)
from fewstep.programs.workbench import Workbench
from fewstep.recording import Recording
from fewstep.recording.pipeline import name_of
from fewstep.training.distributed import join_launch, on_main
from fewstep.training.fate import shared_fate

logger = logging.getLogger("fewstep")

_ROWS = 256  # in a file of the pairs that a run makes for itself, or its batch where that is larger


def make_pairs(teacher: str | Path | DiffusionPipeline, **settings: Any) -> Path:
    """Make noise-sample pairs of a teacher's ODE, for ``fewstep distill rectified_flow --pairs``.

    Killed at any moment, it goes on with ``resume``. The pairs are bit-equal whatever the number of processes.

    Args:
        teacher: folder, hub id, embedded name, or a loaded pipeline.
        **settings: fields of :class:`PairsConfig`; ``out`` and ``num`` are needed. ``items`` may be a list of them.

    Returns:
        The folder.

    Raises:
        UserError: for everything that a user can mend.
    """
    pipeline = teacher if isinstance(teacher, DiffusionPipeline) else None
    name = str(teacher) if pipeline is None else name_of(pipeline)
    items = None if isinstance(settings.get("items"), str | Path) else settings.pop("items", None)
    try:
        config = PairsConfig(teacher=name, **settings)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(PairsConfig))
        raise UserError(f"pairs have no such setting: {error}; there are: {known}") from error
    accelerator = join_launch(config.cpu)
    with nothing_left(Path(config.out)), shared_fate(accelerator):
        _make_pairs(config, pipeline, accelerator, items)
    return Path(config.out)


def _make_pairs(
    config: PairsConfig, pipeline: DiffusionPipeline | None, accelerator: Accelerator, items: Sequence[Any] | None
) -> None:
    device, told = accelerator.device, TeacherSettings.of(config)
    told = told if items is None else replace(told, items=items)
    opened = open_teacher(told, device, pipeline, progress=accelerator.is_main_process)
    recording = opened.recording
    opened.refuse_next_time("and no pairs can be made of it yet")
    if quantized := quantized_network(recording):
        raise UserError(f"the {quantized} is quantised; make pairs of the teacher in full precision")
    if config.data is not None and recording.conditional == "item":
        raise UserError(
            "--data of fewstep pairs is of prompts or classes, and this teacher is asked for items: leave it out; "
            "fewstep distill rectified_flow --data targets makes such pairs of the items' own results"
        )
    conditions = conditions_of(config, opened, device, progress=accelerator.is_main_process)
    scale, draws = opened.guidance_scale, Draws(config.seed, RESPONSE_STEP, range(2), device)
    refuse_guided_alike(recording, scale, conditions, draws)
    out = Path(config.out)
    real, images_digest = None, None
    if config.data is not None:
        source, index = config.data, out / INDEX_FOLDER
        on_main(accelerator, lambda: len(read_data(source, config.data_text, index, progress=True)))
        images = read_data(source, config.data_text, index)
        on_main(accelerator, lambda: refuse_unusable(images, progress=True))
        images_digest = on_main(accelerator, lambda: all_of(data_contents(images, source)))
        real = captioned(images, recording, conditions, device, workers=config.data_workers)
        if accelerator.is_main_process:
            logger.info(real.note)
    settings_of_pairs = PairSettings(
        num=_count(config, real),
        steps=config.teacher_steps,
        solver=config.solver,
        shift=_own_shift(recording),
        guidance_scale=plain_scale(scale, opened.later_scales),
        seed=config.seed,
        batch_size=config.batch_size,
        shard_size=config.shard_size,
        dtype=config.dtype,
        mixed_precision=config.mixed_precision,
    )
    identity = teacher_digest(recording)
    frozen = make_roles(RoleSettings(mixed_precision=config.mixed_precision), recording, (), device)["teacher"]
    later, rescaling = opened.later_scales, recording.guidance.rescaling
    guided = GuidedDenoiser(frozen, scale, conditions.further, later=later, rescaling=rescaling)
    independent = config.share

    def begin(second: bool) -> PairMaker:
        # Who comes second finds the folder begun.
        resume = second or config.resume or independent is not None
        about = (out, recording, identity, guided, conditions, settings_of_pairs, device)
        return PairMaker(*about, real=real, resume=resume, images_digest=images_digest)

    _make_together(accelerator, begin, independent)


def pairs_of_run(
    wanted: PairsWanted,
    bench: Workbench,
    teacher: Role,
    identity: dict[str, str],
    accelerator: Accelerator,
    claim: Callable[[], None],
) -> PairStream:
    """The pairs that a run trains on, in its keyed order: opened where they are given, else made by its own teacher.

    No more are made than the run will use. What is made lies in ``OUT/pairs`` and ``OUT/inverted_pairs``, and a killed
    run goes on with it.

    Args:
        wanted: by the run.
        bench: of the run.
        teacher: of the run.
        identity: its :func:`fewstep.data.fingerprint.teacher_digest`, taken before the roles were made.
        accelerator: all processes of the run make them together.
        claim: makes ``OUT`` the run's folder; called before anything is made there.

    Raises:
        UserError: given pairs do not fit the run, or are not complete, or damaged.
    """
    config, conditions = bench.config, bench.conditions
    size = config.batch_size
    positions = config.max_steps * size * config.gradient_accumulation_steps * accelerator.num_processes

    def made(folder: Path, real: RealSamples | None) -> StoredPairs:
        claim()
        num = wanted.num if real is None else min(wanted.num, len(real))
        if real is None and len(conditions.sizes()) > 1:
            used = sized_numbers_used(conditions, num, config.seed, config.max_steps, positions // config.max_steps)
        else:
            used = numbers_used(wanted, num, config.seed, positions, inverted=real is not None)
        begun = on_main(accelerator, lambda: begun_about(folder))
        # A folder that was begun for all pairs is gone on with as such, and one of other batches in those.
        numbers = None if begun.get("format") == FORMAT or (not begun and len(used) == num) else used
        settings = PairSettings(
            num=num,
            steps=wanted.steps,
            solver=wanted.solver,
            shift=_own_shift(bench.recording),
            guidance_scale=plain_scale(bench.guidance_scale, bench.teacher.later_scales),
            seed=config.seed,
            batch_size=begun.get("batch_size", size),
            shard_size=begun.get("shard_size", size * max(1, _ROWS // size)),
            mixed_precision=config.mixed_precision,
        )

        def begin(_second: bool) -> PairMaker:
            about = (folder, bench.recording, identity, bench.guided(teacher), conditions, settings, bench.device)
            return PairMaker(*about, real=real, resume=True, numbers=numbers)

        _make_together(accelerator, begin)
        return StoredPairs(folder, identity, conditions, numbers)

    def given(folder: str, source: str, scale: float | list[float] | None) -> StoredPairs:
        found = StoredPairs(folder, identity, conditions)
        if found.about["source"] != source:
            raise UserError(f"the pairs in {folder} were made from {found.about['source']}, and {source} is asked for")
        theirs = found.about["guidance_scale"]
        if scale is not None and theirs != scale:
            raise UserError(
                f"the pairs in {folder} were made at guidance {theirs}, and here it is {scale}; "
                f"give --guidance_scale {theirs}, or make others"
            )
        return found

    own = plain_scale(bench.guidance_scale, bench.teacher.later_scales)
    mine = own if wanted.guided or config.guidance_scale is not None else None
    out = Path(config.out)
    pairs = made(out / "pairs", None) if wanted.folder is None else given(wanted.folder, "noise", mine)
    scale = pairs.about["guidance_scale"] if mine is None else mine
    real: StoredPairs | None = None
    if wanted.invert_real:
        real = made(out / "inverted_pairs", bench.real)
    elif wanted.inverted is not None:
        real = given(wanted.inverted, "images", scale)
    return PairStream(pairs, conditions, bench.device, real, wanted.inverted_share)


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


def _count(config: PairsConfig, real: RealSamples | None) -> int:
    if real is None:
        assert config.num is not None  # where there are no images, it is asked for
        return config.num
    images = len(real)
    if config.num is not None and config.num > images:
        raise UserError(f"--num {config.num} is more than the {images} images of --data {config.data}")
    return config.num or images


def _own_shift(recording: Recording) -> float:
    """The shift of a flow teacher's own time grid, else 1."""
    return teacher_shift(recording) if isinstance(recording.schedule, FlowSchedule) else 1.0
