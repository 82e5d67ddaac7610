"""Encoding a teacher's prompts, labels or items once, into a folder that any number of runs read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline

from fewstep.config.values import number_within
from fewstep.data.condition_cache import CacheWriter
from fewstep.data.conditions import asked_items, draws_of, nothing_drawn, read_classes, read_prompts
from fewstep.data.durable import nothing_left
from fewstep.data.encoded_size import examples_of
from fewstep.data.encoding import CutPrompts, encode_each, encoding_bar, joined_cuts
from fewstep.errors import UserError
from fewstep.programs.latents import cache_images
from fewstep.programs.teacher import TeacherSettings, open_teacher
from fewstep.recording import Recording
from fewstep.recording.pipeline import name_of
from fewstep.training.distributed import join_launch, on_main
from fewstep.training.fate import shared_fate

logger = logging.getLogger("fewstep")


def cache(
    teacher: str | Path | DiffusionPipeline,
    out: str | Path,
    *,
    prompts: str | Path | Sequence[str] | None = None,
    classes: str | Sequence[int] | None = None,
    items: str | Path | Sequence[Mapping[str, Any]] | None = None,
    data: str | Path | None = None,
    data_text: str | None = None,
    data_workers: int = 2,
    dtype: str = "float32",
    without_images: bool = False,
    draws: int = 1,
    call: dict[str, Any] | None = None,
    teacher_lora: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    shard_size: int = 1000,
    resume: bool = False,
    cpu: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Encode prompts, class labels or items, each alone, for ``fewstep distill --cache``: ``fewstep cache`` in Python.

    With ``data``, images are encoded instead, for ``fewstep distill --data``.

    Killed at any moment, it goes on with ``resume``: what a finished shard holds is not encoded again. The
    processes of a launch share the work, and the files are bit-equal whatever their number.

    Args:
        teacher: folder, single .safetensors file, hub id, embedded name, or a loaded pipeline.
        out: folder of the cache.
        prompts: for a text-conditioned teacher: a UTF-8 file with one prompt a line, or the prompts themselves.
        classes: for a class-conditional one: labels such as ``"0-9"``, or the labels themselves.
        items: for one that looks at pictures: a .jsonl or .parquet file, a folder with items.jsonl in it, or the items
            themselves, tables of arguments of the pipeline's call such as ``{"prompt": ..., "image": picture}``.
        data: images, as ``fewstep distill --data`` takes them, to be encoded in the place of prompts or labels.
        data_text: which column, field of a .json or suffix has the texts of images; default text, caption or txt.
        data_workers: threads that read images; 0 reads them when they are wanted.
        dtype: of encoded images: float32, float16 or bfloat16.
        without_images: as of the runs, for an editing teacher that also works without a picture.
        draws: how many are stored of what the teacher draws for an item (an encoder's sample of its picture, noise
            added to it).
        call: further keyword arguments of the teacher's pipeline, the same as of the runs that shall read the cache.
        teacher_lora: as of the runs; only one that changes a text encoder makes another cache.
        revision: branch, tag or commit of a hub id.
        subfolder: where in a folder or repository the pipeline lies.
        variant: of the weights, such as fp16; default the plain ones, or where there are none the only variant.
        shard_size: items in one file.
        resume: go on with a cache that is not complete.
        cpu: encode on the CPU even where there is a GPU.
        trust_remote_code: let a pipeline run code from its own folder.

    Returns:
        The folder.

    Raises:
        UserError: for everything that a user can mend.
    """
    number_within("--shard_size", shard_size, 2**31 - 1)
    number_within("--draws", draws, 1000)
    if sum(given is not None for given in (prompts, classes, items, data)) > 1:
        raise UserError("give one of --prompts, --classes, --items and --data, not several")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise UserError(f"--dtype must be one of float32, float16, bfloat16, not {dtype!r}")
    if data_workers < 0:
        raise UserError(f"--data_workers must not be negative, and is {data_workers}")
    texts = read_prompts(prompts) if isinstance(prompts, str | Path) else prompts
    labels = read_classes(classes) if isinstance(classes, str) else classes
    launch = join_launch(cpu)
    pipeline = teacher if isinstance(teacher, DiffusionPipeline) else None
    name = str(teacher) if pipeline is None else name_of(pipeline)
    settings = TeacherSettings(
        teacher=name,
        revision=revision,
        subfolder=subfolder,
        variant=variant,
        call=call,
        teacher_lora=teacher_lora,
        trust_remote_code=trust_remote_code,
        items=items,
        without_images=without_images or data is not None,  # which has a part in no image's latents
    )
    with nothing_left(Path(out)), shared_fate(launch):
        if data is not None:
            return cache_images(
                settings,
                pipeline,
                str(data),
                Path(out),
                launch,
                text=data_text,
                workers=data_workers,
                shard_size=shard_size,
                dtype=dtype,
                resume=resume,
            )
        opened = open_teacher(settings, launch.device, pipeline, progress=launch.is_main_process)
        recording, shown = opened.recording, opened.items
        asked = asked_items(recording, texts, labels, None if shown is None else shown.each)
        if not asked:
            raise UserError(f"{name} is conditioned on nothing, so there is nothing to encode; train without --cache")
        # Each process gets a copy of the writer that one of them began.
        source = str(Path(items).resolve()) if isinstance(items, str | Path) else None
        kept = draws_of(recording, draws)
        writer = on_main(launch, lambda: CacheWriter(out, recording, name, asked, shard_size, resume, source, kept))
        if shown is not None and launch.is_main_process:
            logger.info(examples_of(recording, shown.each).describe(kept))
            if note := nothing_drawn(draws, kept):
                logger.info(note)
        try:
            _encode_together(launch, recording, writer)
        except UserError:
            if launch.is_main_process and not writer.index["shards"]:
                writer.forget()
            raise
    return writer.folder


def _encode_together(launch: Accelerator, recording: Recording, writer: CacheWriter) -> None:
    """Every process encodes a shard, and one of them enters all of these in the index; until none is missing."""
    missing, rank, world, main = writer.missing, launch.process_index, launch.num_processes, launch.is_main_process
    to_do = sum(len(writer.of(shard)) for shard in missing)
    done = len(writer.items) - to_do
    if done and main:
        logger.info(f"{done} of {len(writer.items)} are there already")
    cut = CutPrompts()
    mine = sum(len(writer.of(shard)) for shard in missing[rank::world])
    with encoding_bar(recording, done + mine, done=done, disable=not main) as bar:
        for first in range(0, len(missing), world):
            written = [
                writer.write(shard, list(encode_each(recording, writer.of(shard), cut, bar, writer.draws)))
                for shard in missing[first : first + world][rank : rank + 1]
            ]
            written = gather_object(written)
            if main:
                writer.enter(written)
    cuts = gather_object([cut])
    if main and (note := joined_cuts(cuts).note(to_do)):
        logger.info(note)
    launch.wait_for_everyone()
