"""``fewstep eval DIR ...``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.config.parsing import Parser, parse, step_counts, with_values
from fewstep.eval.evaluate import evaluate
from fewstep.eval.exporters import EXPORTERS
from fewstep.eval.metrics.table import METRICS
from fewstep.eval.presets import PRESETS, with_preset
from fewstep.eval.scorers.clip_score import BACKBONES
from fewstep.teachers.names import embedded_name
from fewstep.training.distributed import Processes, join_launch, leave_launch
from fewstep.training.fate import shared_fate

logger = logging.getLogger("fewstep")

_SWITCHES = {"reference_crop", "strict", "cpu", "unconditional"}
_ABOUT = "Measure students beside their teacher: report.json, report.md, report.html, pictures."


def run(words: Sequence[str]) -> None:
    """Measure students beside their teacher, and print the table."""
    parsed = parse(_parser(), with_values(words, _SWITCHES))
    embedded = parsed.teacher is not None and embedded_name(parsed.teacher) is not None
    told = {
        "num": parsed.num,
        "metrics": None if parsed.metrics is None else tuple(_list(parsed.metrics)),
        "reference": parsed.reference,
        "reference_crop": parsed.reference_crop or None,
        "fid_mode": parsed.fid_mode,
        "clip_model": parsed.clip_model,
        "steps": None if parsed.steps is None else step_counts("--steps", parsed.steps),
        "teacher_steps": None if parsed.teacher_steps is None else step_counts("--teacher_steps", parsed.teacher_steps),
        "weights_sha256": parsed.weights_sha256,
    }
    launch = join_launch(parsed.cpu)
    processes = Processes(launch.process_index, launch.num_processes)
    if processes.count > 1 and launch.is_main_process:
        logger.info("%d processes on %s share the samples", processes.count, launch.device.type)
    with shared_fate(launch):
        report = evaluate(
            parsed.models,
            teacher=parsed.teacher,
            revision=parsed.revision,
            subfolder=parsed.subfolder,
            variant=parsed.variant,
            base=parsed.base,
            teacher_call=parsed.teacher_call,
            prompts=parsed.prompts,
            classes=parsed.classes,
            items=parsed["items"],  # the attribute is a method
            unconditional=parsed.unconditional,
            batch_size=parsed.batch_size or (100 if embedded else 8),
            train_data=parsed.train_data,
            weights=None if parsed.weights is None else Path(parsed.weights),
            strict=parsed.strict,
            images=parsed.images,
            dtype=parsed.dtype,
            seed=parsed.seed,
            out=Path(parsed.out),
            device=str(launch.device),
            processes=processes,
            export=_list(parsed.export or ""),
            export_prompts=parsed.export_prompts,
            **with_preset(parsed.preset, told),
        )
    if launch.is_main_process:
        print(report.table())
    leave_launch()


def _list(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _parser() -> Parser:
    parser = Parser(prog="fewstep eval", description=_ABOUT)
    parser.add_argument("models", metavar="DIR", nargs="*", type=str, help="student folders")
    parser.add_argument("--teacher", type=str | None, default=None, help="folder, hub id or embedded one (fashion-sd)")
    parser.add_argument("--revision", type=str | None, default=None, help="of a teacher that is a hub id")
    parser.add_argument("--subfolder", type=str | None, default=None, help="where the teacher lies in it")
    parser.add_argument("--variant", type=str | None, default=None, help="of the teacher's weights, such as fp16")
    parser.add_argument("--base", type=str | None, default=None, help="of LoRAs: their base model's folder or hub id")
    parser.add_argument(
        "--teacher_steps", type=str | None, default=None, help="such as 4,28; default its own, and the students'"
    )
    parser.add_argument(
        "--teacher_call", type=dict[str, Any] | None, default=None, help="JSON of arguments for its call"
    )
    parser.add_argument("--steps", type=str | None, default=None, help="such as 1,2,4; default those of each card")
    parser.add_argument("--num", type=int | None, default=None, help="samples in every row; default 5000")
    parser.add_argument("--prompts", type=str | None, default=None, help="UTF-8 file, one a line")
    parser.add_argument("--classes", type=str | None, default=None, help="labels such as 0-9")
    parser.add_argument(
        "--items", type=str | None, default=None, help="prompts with pictures: .jsonl, .parquet, folder"
    )
    parser.add_argument("--unconditional", type=bool, default=False, help="the models take neither; checked")
    parser.add_argument("--metrics", type=str | None, default=None, help=f"some of {','.join(METRICS)}; default all")
    parser.add_argument(
        "--reference", type=str | None, default=None, help="teacher (default), FOLDER, STATS.npz, fashion or none"
    )
    parser.add_argument("--reference_crop", type=bool, default=False, help="fit its images to the samples' size")
    parser.add_argument("--train_data", type=str | None, default=None, help="the teacher's training images")
    parser.add_argument("--preset", type=str | None, default=None, help=f"a paper's protocol: {', '.join(PRESETS)}")
    parser.add_argument("--weights", type=str | None, default=None, help="folder of the metrics' networks")
    parser.add_argument(
        "--weights_sha256", type=dict[str, str] | None, default=None, help="JSON {FILE: hash} of unpublished hashes"
    )
    parser.add_argument("--strict", type=bool, default=False, help="stop where a metric cannot be measured")
    parser.add_argument("--fid_mode", type=str | None, default=None, help="clean, legacy_tensorflow, legacy_pytorch")
    parser.add_argument(
        "--clip_model",
        type=str | None,
        default=None,
        help="of the CLIP score: " + ", ".join(one.name for one in BACKBONES),
    )
    parser.add_argument("--images", type=str, default="all", help="which samples are kept as PNG: all or shown")
    parser.add_argument("--export", type=str | None, default=None, help=f"samples for: {', '.join(EXPORTERS)}")
    parser.add_argument("--export_prompts", type=str | None, default=None, help="the benchmark's own file of prompts")
    parser.add_argument(
        "--batch_size", type=int | None, default=None, help="default: 100 for embedded teachers, else 8"
    )
    parser.add_argument("--dtype", type=str, default="float32", help="float32, float16 or bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", type=bool, default=False, help="stay on the CPU even where there is a GPU")
    parser.add_argument("--out", type=str, required=True, help="folder for the report; what is there goes on")
    return parser
