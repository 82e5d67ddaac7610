"""What ``fewstep pairs`` is told, and what a run that trains on pairs asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewstep.config.checks import Settings
from fewstep.diffusion.ode import SOLVERS
from fewstep.errors import UserError


@dataclass(kw_only=True)
class PairsConfig(Settings):
    """Noise-sample pairs of a teacher's ODE.

    Args:
        teacher: folder, single .safetensors file or hub id of a diffusers pipeline, or an embedded teacher (fashion-sd,
            fashion-flow, fashion-inpaint).
        revision: branch, tag or commit of a hub id; default its main branch.
        subfolder: where in a folder or repository the pipeline lies.
        variant: of the weights, such as fp16; default the plain ones, or where there are none the only variant.
        out: folder for the pairs.
        num: how many; with --data default all images.
        prompts: UTF-8 file with one prompt a line, for text-to-image and text-to-video teachers; or whatever --data
            takes that has texts, of which each is one.
        classes: class labels such as 0-9 or 1,5,7, for class-conditional teachers.
        items: for teachers that look at a picture: a .jsonl or .parquet file, or a folder with items.jsonl in it; a row
            has a prompt and the pictures of the pipeline's call under their own names, as paths relative to the file.
        cache: folder of fewstep cache, in the place of prompts or classes; with items, of these.
        call: JSON of further keyword arguments of the teacher's pipeline (height, width, num_frames, ...).
        guidance_scale: guidance of the teacher, diffusers' convention (1 = off); default the pipeline's own.
        image_guidance_scale: of a teacher with three answers (InstructPix2Pix), its guidance towards the picture;
            default the pipeline's own.
        negative_prompt: what guidance leads away from; default the pipeline's own.
        teacher_steps: steps of the teacher's ODE for each pair.
        solver: euler (DDIM for tables) or heun (twice the network calls).
        teacher_lora: the teacher is its pipeline with this LoRA: a safetensors file, a folder of one, or a hub id.
        data: real images; the ODE is followed from them to their noise. What they show must be among the prompts.
        data_text: which column, field of a .json or suffix has the texts of images; default text, caption or txt.
        data_workers: threads that read images beside the work; 0 reads them when they are wanted.
        batch_size: samples in one call of the network.
        shard_size: pairs in one file, which is also what is lost when a process is killed.
        dtype: of the stored samples: float32, float16 or bfloat16.
        mixed_precision: no (float32) or bf16 (a bfloat16 teacher).
        seed: of the noise.
        resume: go on with what is in out.
        rank: which of --world independent processes this is; not needed under accelerate launch or torchrun.
        world: how many independent processes share the work.
        cpu: make them on the CPU even where there is a GPU.
        trust_remote_code: let a pipeline run code from its own folder.
        without_images: as of the runs, for an editing teacher that also works without a picture.
    """

    teacher: str
    out: str
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    num: int | None = None
    prompts: str | None = None
    classes: str | None = None
    items: str | None = None
    cache: str | None = None
    call: dict[str, Any] | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    negative_prompt: str | None = None
    teacher_steps: int = 25
    solver: str = "euler"
    teacher_lora: str | None = None
    data: str | None = None
    data_text: str | None = None
    data_workers: int = 2
    batch_size: int = 16
    shard_size: int = 256
    dtype: str = "float32"
    mixed_precision: str = "no"
    seed: int = 0
    resume: bool = False
    rank: int | None = None
    world: int | None = None
    cpu: bool = False
    trust_remote_code: bool = False
    without_images: bool = False

    def __post_init__(self) -> None:
        self._refuse_misfits("teacher", "out", "prompts", "classes", "items", "cache", "data", "teacher_lora")
        if self.num is None and self.data is None:
            raise UserError("--num is needed: how many pairs to make")
        self._refuse_below_one("num", "teacher_steps", "batch_size", "shard_size")
        self._refuse_negative("data_workers", "guidance_scale", "image_guidance_scale")
        if self.data is None and self.prompts is None:
            self._refuse_set("says which texts of --data or --prompts are meant", "data_text")
        self._refuse_unknown("solver", *SOLVERS)
        self._refuse_unknown("dtype", "float32", "float16", "bfloat16")
        self._refuse_unknown("mixed_precision", "no", "bf16")
        if (self.rank is None) != (self.world is None):
            raise UserError("--rank and --world go together: which process this is, and of how many")
        if self.share is not None and not 0 <= self.share[0] < self.share[1]:
            raise UserError(f"--rank counts from 0 to --world - 1; {self.rank} of {self.world} is none of them")
        if sum(given is not None for given in (self.prompts, self.classes, self.items or self.cache)) > 1:
            raise UserError("give one of --prompts, --classes and --cache, not several")

    @property
    def share(self) -> tuple[int, int] | None:
        """(rank, world) of one of several independent processes; None for one that knows of no others."""
        return None if self.rank is None or self.world is None else (self.rank, self.world)


@dataclass(frozen=True)
class PairsWanted:
    """Noise-sample pairs of the teacher's ODE that a run trains on.

    Attributes:
        num: how many there are where no folder is given, of real samples at most as many as those; of them the run
            makes what it will use.
        steps: of the ODE.
        solver: of :data:`fewstep.diffusion.ode.SOLVERS`.
        folder: of pairs that were made before.
        inverted: likewise, of real images with the noise that the ODE leads them to.
        invert_real: make the latter from the run's real samples, which then are not given as such.
        inverted_share: of a batch's pairs that are inverted ones.
        guided: whether the run guides its teacher beside them, by a scale that then has to be theirs.
    """

    num: int
    steps: int
    solver: str
    folder: str | None = None
    inverted: str | None = None
    invert_real: bool = False
    inverted_share: float = 0.0
    guided: bool = False

    @property
    def of_real(self) -> bool:
        """Whether some are of real samples."""
        return self.invert_real or self.inverted is not None
