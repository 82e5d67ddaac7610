"""Encoding a set of images with a teacher's VAE once, into a folder that any number of runs read as ``--data``."""

from __future__ import annotations

import logging
from pathlib import Path

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from fewstep.data.images import read_images
from fewstep.data.latents import LatentMaker
from fewstep.data.shard_index import INDEX_FOLDER
from fewstep.programs.teacher import TeacherSettings, open_teacher
from fewstep.training.distributed import on_main

logger = logging.getLogger("fewstep")


def cache_images(
    settings: TeacherSettings,
    pipeline: DiffusionPipeline | None,
    source: str,
    out: Path,
    launch: Accelerator,
    *,
    text: str | None,
    workers: int,
    shard_size: int,
    dtype: str,
    resume: bool,
) -> Path:
    """Encode the images of ``--data``, shared among the processes of a launch; see :func:`fewstep.cache`.

    Args:
        settings: of the teacher.
        pipeline: its own, where it is in memory already.
        source: where the images are.
        out: folder of the latents.
        launch: whose processes share the work.
        text: ``--data_text``.
        workers: threads that read images.
        shard_size: images in one file.
        dtype: of what is stored.
        resume: go on with what is there.

    Returns:
        The folder.

    Raises:
        UserError: for everything that a user can mend.
    """
    index = out / INDEX_FOLDER
    on_main(launch, lambda: len(read_images(source, text, index, progress=True)))
    images = read_images(source, text, index)
    recording = open_teacher(settings, launch.device, pipeline).recording
    main = launch.is_main_process

    def begin(again: bool) -> LatentMaker:
        """Who comes second finds the folder begun."""
        return LatentMaker(out, recording, images, source, shard_size=shard_size, dtype=dtype, resume=again)

    on_main(launch, lambda: len(begin(resume).shards.numbers))
    maker = begin(True)
    rank, world = launch.process_index, launch.num_processes
    count = sum(len(maker.shards.rows(number)) for number in maker.shards.numbers[rank::world])
    with tqdm(total=count, desc="encode", unit="image", delay=2, disable=not main) as bar:
        maker.run(rank, world, workers=workers, on_rows=bar.update)
    launch.wait_for_everyone()
    if main:
        logger.info(f"{len(images):,} images{images.passed_over}")
    return out
