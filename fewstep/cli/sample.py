"""``fewstep sample DIR``."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.config.parsing import Parser, parse
from fewstep.eval.sample import sample


def run(words: Sequence[str]) -> None:
    """Write samples of a student into one PNG file."""
    parser = Parser(prog="fewstep sample", description="Sample from a student, with the call on its card.")
    parser.add_argument("directory", metavar="DIR", type=str, help="a student's folder (or a teacher's, with --steps)")
    parser.add_argument("--revision", type=str | None, default=None, help="of a teacher that is a hub id")
    parser.add_argument("--subfolder", type=str | None, default=None, help="where the teacher lies in it")
    parser.add_argument("--variant", type=str | None, default=None, help="of the teacher's weights, such as fp16")
    parser.add_argument("--base", type=str | None, default=None, help="of a LoRA: its base model's folder or hub id")
    parser.add_argument("--prompt", type=str | None, default=None)
    parser.add_argument(
        "--negative_prompt", type=str | None, default=None, help="what a student steers away from (NASA)"
    )
    parser.add_argument("--nasa_scale", type=float | None, default=None, help="how strongly (default 0.3)")
    parser.add_argument("--class", dest="label", type=int | None, default=None, help="a class label")
    parser.add_argument(
        "--items", type=str | None, default=None, help="prompts with pictures: .jsonl, .parquet, folder"
    )
    parser.add_argument("--steps", type=int | None, default=None, help="default: the student's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int | None, default=None, help="how many samples; default 1, or all items")
    parser.add_argument("--out", type=str, required=True, help="a PNG file")
    parsed = parse(parser, words)
    path = sample(
        parsed.directory,
        prompt=parsed.prompt,
        negative_prompt=parsed.negative_prompt,
        nasa_scale=parsed.nasa_scale,
        label=parsed.label,
        items=parsed["items"],  # the attribute is a method
        steps=parsed.steps,
        seed=parsed.seed,
        num=parsed.num,
        base=parsed.base,
        revision=parsed.revision,
        subfolder=parsed.subfolder,
        variant=parsed.variant,
        out=parsed.out,
    )
    print(path)
