"""``fewstep cache``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewstep.config.parsing import Parser, parse, with_values
from fewstep.programs.cache import cache
from fewstep.training.distributed import leave_launch


def run(words: Sequence[str]) -> None:
    """Encode prompts or labels into a folder for ``fewstep distill --cache``."""
    from accelerate import PartialState

    parser = Parser(prog="fewstep cache", description="Encode prompts or labels once, for fewstep distill --cache.")
    parser.add_argument("--teacher", type=str, required=True, help="folder, file, hub id, or an embedded name")
    parser.add_argument("--revision", type=str | None, default=None, help="branch, tag or commit of a hub id")
    parser.add_argument("--subfolder", type=str | None, default=None, help="where in it the pipeline lies")
    parser.add_argument("--variant", type=str | None, default=None, help="of the weights, such as fp16")
    parser.add_argument("--call", type=dict[str, Any] | None, default=None, help="JSON for its call, as in the run")
    parser.add_argument("--prompts", type=str | None, default=None, help="UTF-8 file, one a line")
    parser.add_argument("--classes", type=str | None, default=None, help="labels such as 0-9")
    parser.add_argument("--items", type=str | None, default=None, help="prompts with pictures: .jsonl or .parquet")
    parser.add_argument("--without_images", type=bool, default=False, help="an editing teacher by its prompts alone")
    parser.add_argument("--draws", type=int, default=1, help="of what the teacher draws for an item")
    parser.add_argument("--data", type=str | None, default=None, help="images, encoded for fewstep distill --data")
    parser.add_argument("--data_text", type=str | None, default=None, help="which column, field or suffix has texts")
    parser.add_argument("--data_workers", type=int, default=2, help="threads that read images")
    parser.add_argument("--dtype", type=str, default="float32", help="of images: float32, float16 or bfloat16")
    parser.add_argument("--teacher_lora", type=str | None, default=None, help="the teacher's LoRA, as in the run")
    parser.add_argument("--out", type=str, required=True, help="folder of the cache")
    parser.add_argument("--shard_size", type=int, default=1000, help="items in one file")
    parser.add_argument("--resume", type=bool, default=False, help="go on with a cache that is not complete")
    parser.add_argument("--cpu", type=bool, default=False, help="encode on the CPU even where there is a GPU")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="let it run code from its own folder")
    parsed = parse(parser, with_values(words, {"resume", "cpu", "trust_remote_code", "without_images"}))
    folder = cache(**parsed.as_dict())
    if PartialState().is_main_process:
        flag = "--cache" if parsed.data is None else "--data"
        print(f"the cache is in {folder}; fewstep distill METHOD --teacher {parsed.teacher} {flag} {folder} reads it")
    leave_launch()
