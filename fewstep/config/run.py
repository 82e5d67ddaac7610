"""What every distillation run is told. Each method adds its own fields in ``trainers/<method>.py``."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from fewstep.config.attention import AUTO, refuse_unknown_backend
from fewstep.config.checks import Settings, names_of, setting
from fewstep.config.pairs import PairsWanted
from fewstep.config.partition import PartitionWanted
from fewstep.config.values import number_within
from fewstep.diffusion.timesteps import WalkTimes
from fewstep.errors import UserError

#: What ``--quantization`` takes; :mod:`fewstep.teachers.quantization` says what each is.
QUANTIZATIONS = ("bitsandbytes_4bit", "bitsandbytes_8bit", "torchao_int8", "quanto_int8", "quanto_int4")


@dataclass(kw_only=True)
class RunConfig(Settings):
    """A run of any method.

    Settings stay as they were given, so that ``dataclasses.replace`` asks for them and nothing more. What follows from
    one that was not given is said by :meth:`resolved`, which is what a run reads, and what it writes down.

    Args:
        teacher: folder, single .safetensors file or hub id of a diffusers pipeline, or an embedded teacher (fashion-sd,
            fashion-flow, fashion-inpaint).
        revision: branch, tag or commit of a hub id; default its main branch.
        subfolder: where in a folder or repository the pipeline lies.
        variant: of the weights, such as fp16; default the plain ones, or where there are none the only variant.
        out: folder for the student, checkpoints, samples and logs.
        steps: number of network calls the student makes per sample.
        prompts: UTF-8 file with one prompt a line, for text-to-image and text-to-video teachers; or whatever --data
            takes that has texts, of which each is one.
        classes: class labels such as 0-9 or 1,5,7, for class-conditional teachers.
        items: for teachers that look at a picture: a .jsonl or .parquet file, or a folder with items.jsonl in it; a row
            has a prompt and the pictures of the pipeline's call under their own names, as paths relative to the file.
        without_images: with prompts, for an editing teacher that also works without a picture (Flux Kontext): so it is
            recorded, and its student never sees one, as the card says.
        cache: a folder of ``fewstep cache``, in the place of prompts or classes; with items, of these.
        draws: how many are kept of what the teacher draws for an item (an encoder's sample of its picture, noise added
            to it), one of which each step takes; ``fewstep probe`` says how far two are apart.
        call: JSON of further keyword arguments of the teacher's pipeline (height, width, num_frames, ...).
        guidance_scale: guidance of the teacher, diffusers' convention (1 = off); default the pipeline's own. A network
            with embedded guidance is told this value instead, teacher and student alike.
        image_guidance_scale: of a teacher with three answers (InstructPix2Pix), its guidance towards the picture,
            beside guidance_scale, which is that towards the prompt; default the pipeline's own.
        sequential_guidance: ask a guided network for the condition and for its negative in two calls: slower, and in
            less memory where no gradient passes through them.
        negative_prompt: what guidance leads away from; default the pipeline's own.
        data: real images: a folder with class sub-folders, a metadata.jsonl or .csv, or texts beside them; WebDataset
            or parquet shards (a file, a folder, a pattern); a folder of idx files; "fashion"; a folder that fewstep
            cache --data made; or "targets", the column target of the items, each row's wanted result.
        data_text: which column, field of a .json or suffix has the texts of images; default text, caption or txt.
        data_workers: threads that read images beside the training; 0 reads them when they are wanted.
        teacher_lora: the teacher is its pipeline with this LoRA: a safetensors file, a folder of one, or a hub id.
        init: another run's folder (its last student, critics and heads) or a pipeline folder (student only).
        lora_rank: rank of LoRA adapters for student and critic on the frozen teacher; 0 trains full copies instead.
        lora_alpha: an adapter's product is scaled by alpha / rank; default the rank.
        lora_walks: with --lora_rank, what the student's steps without gradient are made with: merged (a copy of the
            adapted weights with the adapter added, faster), adapter, or auto: merged where the frozen weights are
            float32, whole and not quantised, so that nothing is rounded.
        full_critic: with --lora_rank, the critic is a full copy all the same.
        quantization: with --lora_rank, load the frozen network in fewer bits, by diffusers and the library that is
            named: bitsandbytes_4bit (NF4), bitsandbytes_8bit, torchao_int8, quanto_int8 or quanto_int4.
        merge: with --lora_rank, also write a whole pipeline with the adapter merged.
        export_dtype: of the trained network in the files of a whole pipeline: float32, bfloat16 or float16; default
            what the teacher's network has in its files.
        push_to_hub: hub repository (owner/name) that the exported student is uploaded to; with --merge that is the
            whole pipeline, and the LoRA goes to the same name with -lora.
        hub_private: make a new repository a private one.
        max_steps: number of steps to train.
        batch_size: samples per process and micro-batch.
        gradient_accumulation_steps: micro-batches per update.
        lr: learning rate of the student.
        lr_warmup_steps: steps of linear warm-up.
        adam_beta1: of AdamW, every role.
        adam_beta2: of AdamW, every role.
        adam_weight_decay: of AdamW, every role.
        max_grad_norm: gradients are clipped to this norm, each role by itself; 0 turns clipping off.
        ema_decay: decay of the student's average, which then is what is sampled and exported; 0 turns it off.
        renoise: how the student moves between steps: fresh noise, ode, or auto for what its scheduler carries best.
        shift: time shift of a flow student's grid; default the teacher's own.
        dynamic_shift: of a teacher that shifts its times by the size: static for a student with the recorded size's
            times at every size, keep for one whose scheduler shifts as the teacher's.
        first_timestep: the timestep of a table teacher's student at its first step (DMD2's one-step SDXL: 399).
        first_sigma: the noise level of an EDM teacher's student at its first step (SiD: 2.5); default the top.
        start: what a table teacher's student starts from: noise, or marginal for noise times the first step's sigma.
        mixed_precision: no (float32) or bf16 (autocast, and a bfloat16 teacher).
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        attention_backend: that the run's networks compute attention with, by diffusers' names (native, xformers, flash,
            ...): tried forward and backward before training, and left out, with a line, where it cannot be used;
            default auto, what the teacher's network has.
        compile: run the networks of student, critic and teacher as graphs of torch.compile, which takes minutes before
            the first step and a compiler (a C++ compiler on a CPU, Triton on a GPU); without one they run as they are.
        sharding: how roles lie on several processes: none (each has all of them), full (each has a part), or hybrid
            (full within a group of processes; every group has a copy).
        sharding_group: with --sharding hybrid, processes in a group; default those of one machine.
        sharding_offload: with --sharding, the parts lie in the CPU's memory while they are not computed with.
        checkpointing_steps: steps between checkpoints.
        checkpoints_total_limit: how many checkpoints are kept.
        log_steps: steps between lines in metrics.jsonl.
        sample_steps: steps between sample grids; 0 turns them off.
        eval_steps: steps between evaluations of a small fixed set of the student's samples; 0 turns them off.
        eval_samples: samples of that set, whose noise and conditions are the same in every evaluation.
        eval_metric: which of the evaluator's numbers tells the best evaluation, whose checkpoint stays in
            OUT/checkpoint_best; default its first.
        eval_patience: so many evaluations of which none was the best end the run early, and well; 0 never does.
        eval_weights: folder of the weights of the network that looks at samples; default that of $FEWSTEP_WEIGHTS.
        export_best: the student that is written is that of OUT/checkpoint_best; default the last.
        stop_on: what ends a run: nan (a gradient or a weight that is not finite), collapse (that, and samples that are
            constant, alike or over-saturated, an explosion, a standstill), or never (an update that is not finite is
            left out); whatever is wrong is said in any case.
        rollbacks: how often a run, instead of ending so, goes back to its last good checkpoint, and on from there with
            half the learning rates and other random draws.
        report_to: trackers of accelerate, comma separated, or "auto" for TensorBoard where it is installed, or "none".
        seed: of every random draw.
        resume: go on from the last checkpoint in out.
        cpu: train on the CPU even where there is a GPU.
        trust_remote_code: let a pipeline run code from its own folder.
    """

    #: What --renoise takes; a method may know another walk.
    RENOISE: ClassVar[tuple[str, ...]] = ("auto", "ode", "fresh")

    teacher: str = setting("source")
    out: str = setting("machine")
    revision: str | None = setting("source", None)
    subfolder: str | None = setting("source", None)
    variant: str | None = setting("source", None)
    steps: int = 4
    prompts: str | None = setting("source", None)
    classes: str | None = None
    items: str | None = setting("source", None)
    without_images: bool = False
    cache: str | None = setting("source", None)
    draws: int = 1
    call: dict[str, Any] | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    sequential_guidance: bool = setting("machine", False)
    negative_prompt: str | None = None
    data: str | None = setting("source", None)
    data_text: str | None = None
    data_workers: int = setting("machine", 2)
    teacher_lora: str | None = setting("source", None)
    init: str | None = setting("source", None)
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_walks: str = setting("machine", "auto")
    full_critic: bool = False
    quantization: str | None = None
    merge: bool = setting("export", False)
    export_dtype: str | None = setting("export", None)
    push_to_hub: str | None = setting("machine", None)
    hub_private: bool = setting("machine", False)
    max_steps: int = setting("length", 1000)
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    lr: float = 1e-5
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 10.0
    ema_decay: float = 0.0
    renoise: str = "auto"
    shift: float | None = None
    dynamic_shift: str = "static"
    first_timestep: int | None = None
    first_sigma: float | None = None
    start: str = "noise"
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    attention_backend: str = setting("machine", AUTO)
    compile: bool = setting("machine", False)
    sharding: str = setting("machine", "none")
    sharding_group: int | None = setting("machine", None)
    sharding_offload: bool = setting("machine", False)
    checkpointing_steps: int = setting("watching", 500)
    checkpoints_total_limit: int = setting("watching", 2)
    log_steps: int = setting("watching", 10)
    sample_steps: int = setting("watching", 500)
    eval_steps: int = setting("watching", 0)
    eval_samples: int = setting("watching", 256)
    eval_metric: str | None = setting("watching", None)
    eval_patience: int = setting("length", 0)
    eval_weights: str | None = setting("machine", None)
    export_best: bool = setting("export", False)
    stop_on: str = setting("watching", "nan")
    rollbacks: int = setting("watching", 0)
    report_to: str = setting("machine", "auto")
    seed: int = 0
    resume: bool = setting("machine", False)
    cpu: bool = setting("machine", False)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self._refuse_misfits(*(names_of(type(self), "source", "machine") - {"out"}))  # a plan has none
        self._refuse_below_one("steps", "max_steps", "batch_size", "gradient_accumulation_steps")
        self._refuse_below_one("checkpointing_steps", "log_steps", "checkpoints_total_limit")
        self._refuse_negative("lr", "adam_weight_decay", "max_grad_norm", "lr_warmup_steps", "sample_steps", "seed")
        self._refuse_negative("lora_rank", "data_workers", "rollbacks", "eval_steps", "eval_patience", "guidance_scale")
        self._refuse_negative("image_guidance_scale")
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must be in [0, 1), not {getattr(self, name)}")
        if self.mixed_precision == "fp16":
            raise UserError("--mixed_precision must be one of no, bf16; the scaling of fp16 cannot follow split passes")
        self._refuse_unknown("mixed_precision", "no", "bf16")
        self._refuse_unknown("stop_on", "nan", "collapse", "never")
        self._refuse_unknown("renoise", *self.RENOISE)
        self._refuse_unknown("dynamic_shift", "static", "keep")
        self._refuse_not_positive("shift", "lora_alpha")
        if self.stop_on == "never":
            self._refuse_set("is for a run that would stop, and --stop_on never does not", "rollbacks")
        if self.data is None and self.prompts is None:
            self._refuse_set("says which texts of --data or --prompts are meant", "data_text")
        for name in ("lora_alpha", "full_critic", "merge", "quantization"):
            if getattr(self, name) and not self.lora_rank:
                raise UserError(f"--{name} belongs to adapters: give --lora_rank, or leave it out")
        refuse_unknown_backend(self.attention_backend)
        self._check_walks()
        self._check_quantization()
        self._check_sharding()
        self._check_evaluation()
        if self.export_dtype is not None:
            self._refuse_unknown("export_dtype", "float32", "bfloat16", "float16")
            if self.lora_rank and not self.merge:
                raise UserError("--export_dtype is of a whole pipeline's network: give --merge too, or leave it out")
        if self.push_to_hub is not None and not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]{1,90}", self.push_to_hub):
            raise UserError(f"--push_to_hub takes owner/name, not {self.push_to_hub!r}")
        if self.hub_private and self.push_to_hub is None:
            raise UserError("--hub_private belongs to --push_to_hub: give a repository, or leave it out")
        if (told := [name for name in ("prompts", "classes", "items") if getattr(self, name) is not None])[1:]:
            raise UserError(f"give --{' or --'.join(told)}, not {'both' if len(told) == 2 else 'several'}")
        number_within("--draws", self.draws, 1000)
        if self.cache is not None and (self.prompts is not None or self.classes is not None):
            raise UserError("give --cache or --prompts and --classes, not both: a cache holds the prompts or labels")

    def _check_walks(self) -> None:
        self._refuse_unknown("lora_walks", "auto", "merged", "adapter")
        if self.lora_walks != "auto" and not self.lora_rank:
            raise UserError("--lora_walks belongs to adapters: give --lora_rank, or leave it out")
        if self.lora_walks == "merged" and (self.quantization is not None or self.sharding != "none"):
            what = "--sharding" if self.quantization is None else "--quantization"
            raise UserError(f"--lora_walks merged needs whole weights, which {what} does not leave; leave one out")

    def _check_quantization(self) -> None:
        if self.quantization is None:
            return
        self._refuse_unknown("quantization", *QUANTIZATIONS)
        if self.full_critic:
            raise UserError("--full_critic is a copy to train, which --quantization has not; leave one of them out")
        if self.teacher_lora is not None:
            raise UserError("--teacher_lora cannot be fused into weights of --quantization; leave one of them out")

    def _check_evaluation(self) -> None:
        if self.eval_samples < 2:
            raise UserError(f"--eval_samples must be at least 2, not {self.eval_samples}")
        for name in ("eval_metric", "eval_patience", "eval_weights", "export_best"):
            if getattr(self, name) and not self.eval_steps:
                raise UserError(f"--{name} belongs to evaluations: give --eval_steps, or leave it out")
        if not self.eval_steps:
            self._refuse_set("belongs to evaluations, which --eval_steps asks for", "eval_samples")

    def _check_sharding(self) -> None:
        self._refuse_unknown("sharding", "none", "full", "hybrid")
        self._refuse_below_one("sharding_group")
        if self.sharding_group is not None and self.sharding != "hybrid":
            raise UserError("--sharding_group belongs to --sharding hybrid: give that, or leave it out")
        if self.sharding == "none":
            if self.sharding_offload:
                raise UserError("--sharding_offload belongs to --sharding: give full or hybrid, or leave it out")
        elif self.quantization is not None:
            raise UserError("--quantization cannot be divided by --sharding; leave one of them out")
        elif self.compile:
            raise UserError("--compile traces whole networks, which --sharding divides; leave one of them out")

    def consequences(self) -> dict[str, Any]:
        """Settings that follow from the others where they were not given; a method adds its own to ``super()``'s."""
        return {}

    def resolved(self) -> Self:
        """A copy in which :meth:`consequences` are filled in; nobody changes it, and resolving it again is harmless."""
        resolved = copy.copy(self)
        vars(resolved).update(self.consequences())
        return resolved

    def as_dict(self) -> dict[str, Any]:
        """Every setting by name, in the order of the dataclass."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def merges_walks(self) -> bool:
        """Whether a student that is an adapter walks without gradient on merged weights, if these are not quantised."""
        exact = self.mixed_precision == "no" and self.sharding == "none" and self.quantization is None
        return bool(self.lora_rank) and (self.lora_walks == "merged" or (self.lora_walks == "auto" and exact))

    @property
    def follows_max_steps(self) -> bool:
        """Whether what a step teaches depends on ``max_steps``; a method's curriculum may say so."""
        return False

    @property
    def couples_samples(self) -> bool:
        """Whether the samples of a micro-batch weigh each other, so that another size of it is another training."""
        return False

    def _refuse_kept_noise(self) -> None:
        """Between its steps a consistency model needs fresh noise: x_t made of x0 and its own noise is none of its."""
        if self.steps > 1 and self.renoise == "ode":
            raise UserError(
                "--renoise ode does not sample a consistency model in several steps: the noise it keeps belongs to x0, "
                "and x_t comes out too wide; take --renoise fresh, or --steps 1"
            )

    @property
    def pairs_wanted(self) -> PairsWanted | None:
        """The noise-sample pairs that the run trains on; a method may want some."""
        return None

    @property
    def partition_wanted(self) -> PartitionWanted | None:
        """How the conditions are divided among several students, of a method that has some."""
        return None

    @property
    def resized_network(self) -> dict[str, Any] | None:
        """What is another in the student's network than in the teacher's, of a method whose student may be smaller."""
        return None

    @property
    def walk_gamma(self) -> float | None:
        """How much of the noise each step draws anew, of a method whose students walk as TCD's do; None for others."""
        return None

    @property
    def walk_times(self) -> WalkTimes | None:
        """The times of a flow student's walk, of a method whose walks are not even ones; None for others."""
        return None

    @property
    def embedded_guidance(self) -> tuple[float, float] | None:
        """The range of guidance that the student's network is told by an input of its own; a method may have one."""
        return None
