"""One distillation from a teacher to an exported student: what every method shares before and after its training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline

from fewstep.config.checks import names_of
from fewstep.config.run import RunConfig
from fewstep.data.durable import nothing_left
from fewstep.data.encoders import Encoders
from fewstep.data.fingerprint import teacher_digest
from fewstep.errors import Interrupted, UserError
from fewstep.export import publish
from fewstep.export.student import LORA, WHOLE, Written
from fewstep.networks.roles import Role
from fewstep.programs.auto import CHOOSE, decide
from fewstep.programs.faster import make_faster
from fewstep.programs.methods import method_class
from fewstep.programs.pairs import pairs_of_run
from fewstep.programs.several import run_several
from fewstep.programs.sharded_run import ShardedRun, refuse_undividable
from fewstep.programs.workbench import Workbench, open_workbench
from fewstep.recording.pipeline import name_of
from fewstep.teachers.license import teacher_license
from fewstep.training.best import Best
from fewstep.training.checkpoint import find_latest
from fewstep.training.counters import counters
from fewstep.training.distributed import Processes, join_launch, on_main, samples_line
from fewstep.training.evaluation import Evaluation, MakeEvaluator
from fewstep.training.fate import shared_fate
from fewstep.training.initialization import initialize
from fewstep.training.inputs import RunInputs
from fewstep.training.loop import Loop, sampling_role
from fewstep.training.method import Method
from fewstep.training.monitor import Monitor
from fewstep.training.previews import Previews
from fewstep.training.run_folder import check_folder, write_config
from fewstep.training.samples import Samples
from fewstep.training.shares import kept_batch
from fewstep.training.trackers import trackers

logger = logging.getLogger("fewstep")


def distill(
    teacher: str | Path | DiffusionPipeline,
    method: str = "dmd2",
    *,
    evaluator: MakeEvaluator | None = None,
    **settings: Any,
) -> Path:
    """Distil a teacher and export the student: the command line's ``fewstep distill`` as a function.

    Args:
        teacher: folder, hub id, embedded name, or a loaded pipeline.
        method: a file name of ``fewstep.trainers``, or ``auto`` for the best measured one, with settings of
            :class:`fewstep.config.run.RunConfig` alone.
        evaluator: makes the evaluator that ``eval_steps`` asks for.
        **settings: fields of the method's configuration (``out`` is required), see ``fewstep distill METHOD --help``.
            ``items`` may be a list of them: tables of arguments of the pipeline's call, such as
            ``{"prompt": ..., "image": picture}``.

    Returns:
        The student's folder, a stock diffusers pipeline; with ``lora_rank`` and no ``merge`` that of its LoRA.

    Raises:
        UserError: for everything that a user can mend.
        fewstep.errors.Interrupted: after Ctrl-C, with a checkpoint written.
    """
    pipeline = teacher if isinstance(teacher, DiffusionPipeline) else None
    name = str(teacher) if pipeline is None else name_of(pipeline)
    items = None if isinstance(settings.get("items"), str | Path) else settings.pop("items", None)
    if method == CHOOSE:
        decision = decide({"teacher": name, **settings}, pipeline)
        decision.say()
        return run(decision.config, decision.method, pipeline, evaluator, items)
    try:
        config = method_class(method).Config(teacher=name, **settings)
    except TypeError as error:
        raise UserError(f"{method} has no such setting: {error}") from error
    return run(config, method, pipeline, evaluator, items)


def run(
    config: RunConfig,
    method: str,
    pipeline: DiffusionPipeline | None = None,
    evaluator: MakeEvaluator | None = None,
    items: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Train, then export the student. Returns its pipeline's folder, or its LoRA's where that is all.

    Args:
        config: of the run.
        method: its name.
        pipeline: the teacher's, where it is in memory already, else it is loaded from ``config.teacher``.
        evaluator: makes the evaluator that ``--eval_steps`` asks for.
        items: that are in memory, in the place of ``config.items``.

    Raises:
        UserError: for everything that a user can mend.
        fewstep.errors.Interrupted: after Ctrl-C, with a checkpoint written.
    """
    wanted = config.partition_wanted
    with nothing_left(Path(config.out)):
        if wanted is not None and wanted.only is None:

            def train(own: RunConfig) -> Path:
                return run(own, method, pipeline, evaluator, items)

            return run_several(config, method, wanted, train, pipeline is not None)
        config = config.resolved()
        accelerator = join_launch(config.cpu, log_with=trackers(config.report_to), project_dir=config.out)
        with shared_fate(accelerator, Interrupted):
            return _run(config, method, pipeline, accelerator, evaluator, items)


def _run(
    config: RunConfig,
    method: str,
    pipeline: DiffusionPipeline | None,
    accelerator: Accelerator,
    evaluator: MakeEvaluator | None,
    items: Sequence[Mapping[str, Any]] | None,
) -> Path:
    # 1. This process among those of the launch, and the run's folder.
    out, main = Path(config.out), accelerator.is_main_process
    resuming = check_folder(out, method, config, in_memory=pipeline is not None)
    accelerator.wait_for_everyone()

    def say(line: str) -> None:
        if main and line:
            logger.info(line)

    # One process looks, or they might go on from different checkpoints.
    found = on_main(accelerator, lambda: find_latest(out / "checkpoints")) if resuming else None
    if found is not None:
        say(found.note)
        config, note = kept_batch(config, counters(found), accelerator.num_processes)
        say(note)
    say(samples_line(accelerator, config.batch_size, config.gradient_accumulation_steps))
    inputs = RunInputs(config, pipeline)
    say(on_main(accelerator, inputs.check_here))
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    evaluation = Evaluation(config, evaluator, accelerator.device, processes) if config.eval_steps else None

    # 2. The teacher, the student's plan, and what there is to train on.
    bench = open_workbench(config, accelerator.device, pipeline, say, progress=main, items=items)
    samples = Samples(config, bench.recording, bench.conditions, bench.device, bench.with_default_guidance)
    previews = Previews(samples, wanted=config.sample_steps > 0)
    say(previews.note)
    encoders = Encoders(bench.recording, bench.student.plan.call, bench.teacher.reload)

    with encoders.away(say):
        # 3. The method with its roles. What a teacher's pairs are known by is taken before adapters change its weights.
        wanted = config.pairs_wanted
        identity = teacher_digest(bench.recording, encoders.digests) if wanted is not None else {}
        prepared = prepare(bench, method)
        lora = bench.teacher.lora
        keys = [] if bench.teacher.items is None else bench.teacher.items.contents
        say(on_main(accelerator, lambda: inputs.check_fetched(lora.file if lora is not None else None, keys)))

        # 4. The folder becomes this run's: what is made there from now on is gone on with after a kill.
        def claim() -> None:
            if main:
                write_config(out, method, config)
                inputs.write()
            accelerator.wait_for_everyone()

        teacher, role = prepared.roles["teacher"], sampling_role(prepared.roles)
        pairs = None if wanted is None else pairs_of_run(wanted, bench, teacher, identity, accelerator, claim)
        claim()

        # 5. The training.
        sharded = None
        if config.sharding != "none" and accelerator.num_processes > 1:
            sharded = ShardedRun(bench, prepared, role, accelerator)
        monitor = Monitor(out, config.max_steps, accelerator)
        if accelerator.log_with:
            machine = names_of(type(config), "machine")
            shown = {name: value for name, value in config.as_dict().items() if name not in machine}
            monitor.start_trackers({"method": method, **shown})

        def save_samples(step: int, pause: Callable[[], None]) -> dict[str, float]:
            path = out / "samples" / f"step_{step:08d}.png" if main else None
            spread = previews.save(path, bench.guided(teacher), role, bench.sampler, pause)
            if path is not None and path.exists():
                monitor.show(step, path)
            return spread

        measure = None
        if evaluation is not None:
            evaluation.begin(samples, bench.guided(teacher))
            measure = evaluation.measure

        def evaluate(pause: Callable[[], None]) -> dict[str, float]:
            return {} if evaluation is None else evaluation.numbers(samples, role, bench.sampler, pause)

        best = Best(out, measure, config.eval_patience, processes)
        loop = Loop(
            prepared,
            method,
            config,
            batches=bench.batches(pairs),
            processes=processes,
            monitor=monitor,
            on_samples=save_samples,
            on_evaluation=evaluate,
            best=best,
            holding=None if sharded is None else sharded.sharding,
        )
        if found is not None:
            loop.resume(found)
        try:
            loop.run()
        finally:
            monitor.close()

        # 6. The student, which one process writes.
        if config.export_best:
            say(best.load(role, prepared.roles, loop.holding))
        role = role if sharded is None else sharded.whole_student()
        if main:
            written = export(bench, method, role, encoders)
            say(written.note)
            if config.push_to_hub is not None:
                say(publish(written.folders, config.push_to_hub, config.hub_private))
        accelerator.wait_for_everyone()
    return out / WHOLE if (out / WHOLE).is_dir() else out / LORA


def prepare(bench: Workbench, method: str) -> Method:
    """The method with its roles, which start as the teacher, or as in ``--init``.

    Raises:
        UserError: the method does not fit the teacher, ``--init`` does not, or the student could not be written.
    """
    config = bench.config
    prepared = method_class(method).prepare(config, bench)
    bench.student.refuse_unwritable(bool(config.lora_rank), config.merge)  # what cannot be is not worth training
    bench.student.rehearse(sampling_role(prepared.roles), config.merge)
    if config.sharding != "none":
        refuse_undividable(bench, prepared)
    if config.init is not None:
        initialize(prepared.roles, config.init, bench.student.recording, bench.say, config.trust_remote_code)
    make_faster(bench, prepared.roles)
    return prepared


def export(bench: Workbench, method: str, role: Role, encoders: Encoders) -> Written:
    """Write a role as ``OUT/student``, a stock pipeline, or an adapter as ``OUT/student_lora``, or both."""
    config = bench.config
    private = names_of(type(config), "source", "machine")  # of a machine, nothing of the student
    return bench.student.write(
        role,
        Path(config.out),
        merge=config.merge,
        export_dtype=config.export_dtype,
        before_whole=encoders.restore,  # they are part of what is written
        load_unquantized=lambda parts: bench.teacher.settings.load(parts, quantized=False),
        method=method,
        base_model=config.teacher,
        base_files=None if bench.teacher.source is None else bench.teacher.source.told,
        teacher_license=teacher_license(config.teacher),
        training={k: v for k, v in config.as_dict().items() if k not in private},
    )
