"""What steering away from a class does to a student of an embedded teacher: all pairs of classes, by the classifier.

    python -m fewstep.eval.steering runs/demo-fashion-sd/student --scales 0.1 0.2 0.3 0.5 1.0 --num 20

The prompt embeddings of two classes are averaged, and one of the two is the negative prompt. Shown are its share
among the samples, and the share of those that are classified as either of the two; scale 0 is the student itself.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.config.parsing import Parser, parse
from fewstep.errors import UserError
from fewstep.eval.generate import sample_generator
from fewstep.export import load, nasa
from fewstep.fashion import PROMPTS, load_classifier
from fewstep.fashion.classifier import FashionClassifier, extract

PAIRS = tuple(itertools.combinations(range(len(PROMPTS)), 2))


@dataclass(frozen=True)
class Steered:
    """Means over all pairs: the share of samples in the negative's class, and in either of the two; their number."""

    scale: float
    negative: float
    either: float
    samples: int


def measure(student: DiffusionPipeline, scales: Sequence[float], num: int, seed: int = 0) -> list[Steered]:
    """One row for each scale, and the first for the student itself.

    Args:
        student: as ``fewstep.load`` gives it, of an embedded teacher.
        scales: of :func:`fewstep.nasa`, above 0.
        num: samples of each pair, and of each of its two negatives.
        seed: of the samples; those of one pair start from the same noise at every scale.
    """
    steered, classifier = nasa(student, PROMPTS[0]), load_classifier()
    steered.set_progress_bar_config(disable=True)
    texts = [_embeddings(student, prompt) for prompt in PROMPTS]
    rows = []
    for scale in (0.0, *scales):
        negatives, eithers = [], []
        for pair in PAIRS:
            mixed = {name: (texts[pair[0]][name] + texts[pair[1]][name]) / 2 for name in texts[0]}
            seen = {}
            for away in pair if scale else pair[:1]:  # without a scale both negatives have the same samples
                seen[away] = _classes(steered, classifier, mixed, pair, away, scale, num, seed)
            for away in pair:
                classes = seen.get(away, seen[pair[0]])
                negatives.append((classes == away).float().mean().item())
                eithers.append(sum((classes == one).float().mean().item() for one in pair))
        count = len(PAIRS) * num * (2 if scale else 1)
        rows.append(Steered(scale, _mean(negatives), _mean(eithers), count))
    return rows


def table(rows: Sequence[Steered]) -> str:
    """The rows in Markdown, each beside the first."""
    off = rows[0]
    lines = ["| scale | share of the negative's class | over that without | share of either class | change | samples |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        share, change = row.negative / off.negative if off.negative else 0.0, row.either - off.either
        lines.append(
            f"| {row.scale:g} | {row.negative:.3f} | {share:.2f} | {row.either:.3f} | {change:+.3f} | {row.samples:,} |"
        )
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _embeddings(student: Any, prompt: str) -> dict[str, Tensor]:
    """A prompt's embeddings, each by the argument of the pipeline's call that takes it."""
    if hasattr(student, "transformer"):  # fashion-flow's, of three text encoders
        found = student.encode_prompt(prompt, prompt, prompt, device="cpu", do_classifier_free_guidance=False)
        return {"prompt_embeds": found[0], "pooled_prompt_embeds": found[2]}
    return {"prompt_embeds": student.encode_prompt(prompt, "cpu", 1, False)[0]}


def _classes(
    steered: Any,
    classifier: FashionClassifier,
    mixed: dict[str, Tensor],
    pair: tuple[int, int],
    away: int,
    scale: float,
    num: int,
    seed: int,
) -> Tensor:
    """What the classifier sees in ``num`` samples (num,)."""
    place = PAIRS.index(pair) * num
    rows = {name: value.expand(num, *value.shape[1:]) for name, value in mixed.items()}
    generators = [sample_generator(seed, place + i) for i in range(num)]
    words = {"nasa_negative_prompt": PROMPTS[away], "nasa_scale": scale}
    images = steered(**rows, **words, generator=generators, output_type="pt").images
    return extract(classifier, images.mean(1, keepdim=True))[1].argmax(1)


def main(words: Sequence[str] | None = None) -> int:
    """The command line of this file. Returns the exit code."""
    made = Parser(prog="python -m fewstep.eval.steering", description=__doc__)
    made.add_argument("student", metavar="DIR", type=str, help="folder of a student of an embedded teacher")
    made.add_argument("--scales", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5, 1.0], help="of nasa")
    made.add_argument("--num", type=int, default=20, help="samples of each pair, and of each of its two negatives")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--base", type=str | None, default=None, help="of a LoRA: its base model's folder")
    try:
        asked = parse(made, sys.argv[1:] if words is None else words)
        if asked.num < 1 or asked.seed < 0 or not all(0 < scale < float("inf") for scale in asked.scales):
            raise UserError("--num must be at least 1, --seed at least 0, and --scales above 0")
        student = load(asked.student, asked.base)
        about: dict[str, Any] = getattr(student, "fewstep", {})
        if not str(about.get("base_model", "")).endswith(("fashion-sd", "fashion-flow")):
            raise UserError(f"{asked.student} is no student of fashion-sd or fashion-flow, whose classes are known")
        print(table(measure(student, asked.scales, asked.num, asked.seed)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
