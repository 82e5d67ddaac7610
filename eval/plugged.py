"""What a SpeedUpNet adapter does on a fine-tuned copy of its teacher: the copy at 25 steps beside the same in a few.

    python -m fewstep.eval.plugged runs/speed-up/student --out runs/plugged

The copy is ``fashion-sd``, fine-tuned on pictures of half the brightness, on mirrored ones, as whose shoes point the
other way, or, farthest from its teacher, on ones that stand on their heads. Its samples are turned back, so that the
embedded classifier and its reference judge them. The adapter was trained on the teacher, not on the copy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor

from fewstep.config.parsing import Parser, parse
from fewstep.errors import UserError
from fewstep.eval.features import fashion_reference
from fewstep.eval.generate import sample_generator
from fewstep.eval.metrics.frechet import frechet
from fewstep.export import plug
from fewstep.export.about import read_about
from fewstep.fashion import PROMPTS, load_classifier, teacher_path, training_images
from fewstep.fashion.classifier import extract

_BATCH = 100
#: Of the copy's own sampler, and its guidance.
STEPS, GUIDANCE = 25, 3.0
#: What the copy is fine-tuned on.
Pictures = Literal["dimmed", "mirrored", "upside_down"]
_DROPPED = 0.1  # share of the prompts that are left out, so that the copy can be guided


@dataclass(frozen=True)
class Look:
    """How pictures differ from the training images: ``flipped`` along axes of (N, C, H, W), and ``brightness``."""

    flipped: tuple[int, ...] = ()
    brightness: float = 1.0

    def of(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), black at 0, with this look."""
        return (images * self.brightness).flip(self.flipped)

    def undone(self, pictures: Tensor) -> Tensor:
        """The images (N, C, H, W), 0 to 1, whose look pictures have."""
        return (pictures / self.brightness).clamp(0, 1).flip(self.flipped)


LOOKS: dict[Pictures, Look] = {
    "dimmed": Look(brightness=0.5),
    "mirrored": Look(flipped=(3,)),
    "upside_down": Look(flipped=(2, 3)),
}


@dataclass(frozen=True)
class Plugged:
    """One row: what was sampled, in how many steps, its Fréchet distance, and the share that shows its prompt."""

    name: str
    steps: int
    distance: float
    agreement: float


def tuned_copy(look: Look, steps: int, lr: float, seed: int, batch_size: int = 64) -> StableDiffusionPipeline:
    """``fashion-sd``, fine-tuned for ``steps`` on its training images of this look.

    Its network learns the noise of noised images (Ho et al. 2020) under the teacher's own table.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(teacher_path("fashion-sd"))
    pipeline.set_progress_bar_config(disable=True)
    images, labels = training_images()
    x0, words, nothing = _encoded(pipeline, look.of(images.float()))
    network, signal = pipeline.unet.train(), pipeline.scheduler.alphas_cumprod
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x0), (batch_size,), generator=draws)
        t = torch.randint(len(signal), (batch_size,), generator=draws)
        noise = torch.randn(batch_size, *x0.shape[1:], generator=draws)
        left_out = torch.rand(batch_size, generator=draws) < _DROPPED
        text = torch.where(left_out[:, None, None], nothing, words[labels[rows]])
        alpha, sigma = (part.sqrt()[:, None, None, None] for part in (signal[t], 1 - signal[t]))
        said = network(alpha * x0[rows] + sigma * noise, t, text).sample
        optimizer.zero_grad()
        (said - noise).square().mean().backward()
        optimizer.step()
    network.eval()
    return pipeline


@torch.no_grad()
def _encoded(pipeline: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images as the network's samples (N, ...), the prompts' embeddings (10, L, D), and those of no prompt."""
    pixels = images / 127.5 - 1
    vae = pipeline.vae
    shift = vae.config.shift_factor or 0.0
    x0 = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(_BATCH)])
    words, _ = pipeline.encode_prompt(list(PROMPTS), "cpu", 1, False)
    nothing, _ = pipeline.encode_prompt("", "cpu", 1, False)
    return (x0 - shift) * vae.config.scaling_factor, words, nothing


def judged(name: str, pipeline: DiffusionPipeline, look: Look, num: int, seed: int, **call: Any) -> Plugged:
    """A row of ``num`` samples, evenly of all classes, as the images whose ``look`` they have.

    ``call`` are arguments of the pipeline's call beside prompts.
    """
    sampled: Any = pipeline
    sampled.set_progress_bar_config(disable=True)
    classes, images = torch.arange(num) % len(PROMPTS), []
    for rows in torch.arange(num).split(_BATCH):
        prompts = [PROMPTS[int(classes[row])] for row in rows]
        generators = [sample_generator(seed, int(row)) for row in rows]
        made = sampled(prompts, generator=generators, output_type="pt", **call).images
        images.append(look.undone(made.mean(1, keepdim=True)))
    features, logits = extract(load_classifier(), torch.cat(images))
    share = (logits.argmax(1) == classes).float().mean().item()
    return Plugged(name, call["num_inference_steps"], frechet(features, fashion_reference()), share)


def measure(
    student: str | Path, out: Path, *, pictures: Pictures, tune_steps: int, lr: float, num: int, seed: int
) -> list[Plugged]:
    """Rows of the copy at its own steps and at the student's, and of the copy with the adapter; both lie in ``out``.

    ``pictures`` are what the copy is fine-tuned on.

    Raises:
        UserError: not a SpeedUpNet student of ``fashion-sd``.
    """
    about = read_about(student)
    if about["method"] != "speed_up_net" or about["base_model"] != "fashion-sd":
        raise UserError(f"{student} is no student of speed_up_net and fashion-sd, whose copy is fine-tuned here")
    look = LOOKS[pictures]
    tuned = tuned_copy(look, tune_steps, lr, seed)
    tuned.save_pretrained(out / "copy")
    plugged = plug(tuned, student)
    plugged.save_pretrained(out / "plugged")
    few = about["steps"]
    guided = {"guidance_scale": GUIDANCE}
    rows = [judged("copy", tuned, look, num, seed, num_inference_steps=n, **guided) for n in (STEPS, few)]
    return [*rows, judged("copy with the adapter", plugged, look, num, seed, num_inference_steps=few)]


def table(rows: Sequence[Plugged]) -> str:
    """The rows in Markdown, each beside the first."""
    lines = ["| sampled | steps | FD | over the copy's own | agreement |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        over = row.distance / rows[0].distance
        lines.append(f"| {row.name} | {row.steps} | {row.distance:.3f} | {over:.2f} | {row.agreement:.3f} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """The command line of this file. Returns the exit code."""
    made = Parser(prog="python -m fewstep.eval.plugged", description=__doc__)
    made.add_argument("student", metavar="DIR", type=str, help="folder of a SpeedUpNet student of fashion-sd")
    made.add_argument("--out", type=str, required=True, help="folder of the copy, and of the copy with the adapter")
    made.add_argument("--pictures", type=Pictures, default="dimmed", help="that the copy is tuned on")
    made.add_argument("--tune_steps", type=int, default=400, help="of the fine-tuning")
    made.add_argument("--lr", type=float, default=1e-4, help="of the fine-tuning")
    made.add_argument("--num", type=int, default=5000, help="samples of each row")
    made.add_argument("--seed", type=int, default=0)
    try:
        asked = parse(made, sys.argv[1:] if words is None else words)
        if asked.num < 2 or asked.seed < 0 or asked.tune_steps < 1 or not asked.lr > 0:
            raise UserError("--num must be at least 2, --tune_steps at least 1, --seed at least 0, and --lr above 0")
        out = Path(asked.out)
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty; give --out another folder")
        how = {
            "pictures": asked.pictures,
            "tune_steps": asked.tune_steps,
            "lr": asked.lr,
            "num": asked.num,
            "seed": asked.seed,
        }
        print(table(measure(asked.student, out, **how)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
