"""Sharded runs of a tiny teacher on a few processes, beside the same runs on one: a program, for tests.

    python tests/training/sharded_pair.py OUT CASE [CASE ...]        two processes (four for a case of groups of two)

The processes are forked from one that has imported everything. ``OUT/found.json`` says of each case how far apart the
two sides are, and how many tensors of its averages are not those that whole students make of whole averages. The one
process takes the processes' samples as its micro-batches: the same global batch, and the same arithmetic for each
sample.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from fewstep.data.fingerprint import teacher_digest
from fewstep.data.pair_stream import PairStream
from fewstep.data.pairs import StoredPairs
from fewstep.networks.roles import FOLLOWERS, NetworkRole, Role
from fewstep.programs.distillation import prepare
from fewstep.programs.methods import method_class
from fewstep.programs.pairs import make_pairs
from fewstep.programs.workbench import open_workbench
from fewstep.training.checkpoint import find_latest
from fewstep.training.distributed import Processes
from fewstep.training.loop import Loop
from fewstep.training.sharding import Sharding, open_mesh
from tests import tiny_pipelines
from tests.training.sharded_cases import CASES

_STEPS, _BATCH = 4, 2
_PROMPTS = ("red shoe", "blue coat", "green bag", "old hat")


class Silence:
    """A monitor that says nothing."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_kwargs: []


class Run:
    """One side of a case: its loop, and what its first step gave."""

    def __init__(self, out: Path, case: dict[str, Any], processes: Processes) -> None:
        settings = {"steps": 2, "prompts": "prompts.txt", **case}
        method, teacher = settings.pop("method"), settings.pop("teacher", "tiny_flow")
        offload, group, tie = (settings.pop(name, None) for name in ("offload", "group", "tie"))
        settings = {name: value for name, value in settings.items() if name not in ("resumed", "from")}
        for name in ("prompts", "data", "pairs"):
            if settings.get(name):
                settings[name] = str(out.parent / settings[name])
        count = _count(case)
        settings["gradient_accumulation_steps"] = settings.get("gradient_accumulation_steps", 1) * (
            count // processes.count
        )
        settings["sharding"] = "full" if processes.count > 1 else "none"
        config = method_class(method).Config(
            teacher="tiny",
            out=str(out),
            batch_size=_BATCH,
            max_steps=_STEPS,
            lr=1e-3,
            log_steps=1,
            sample_steps=0,
            checkpointing_steps=2,
            report_to="none",
            **settings,
        )
        pipeline = getattr(tiny_pipelines, teacher)()
        if tie:
            first, second = pipeline.transformer.transformer_blocks
            second.ff.net[0].proj.weight = first.ff.net[0].proj.weight
        bench = open_workbench(config, "cpu", pipeline)
        pairs = None
        if settings.get("pairs"):
            stored = StoredPairs(settings["pairs"], teacher_digest(bench.recording), bench.conditions)
            pairs = PairStream(stored, bench.conditions, bench.device)
        self.method = prepare(bench, method)
        self.sharding = None
        if processes.count > 1:
            self.sharding = Sharding(open_mesh("cpu", processes.count, group), bool(offload))

            def probe(role: NetworkRole) -> None:
                role.denoiser(*bench.two_samples())

            self.sharding.shard(list(self.method.roles.values()), probe)
        self.loop = Loop(
            self.method,
            method,
            config.resolved(),
            batches=bench.batches(pairs),
            processes=processes,
            monitor=Silence(),  # type: ignore[arg-type]
            on_samples=lambda _step, _pause: {},
            holding=self.sharding,
        )
        self.gradients: dict[str, Tensor] = {}
        #: Of the roles that follow the student, by name: whole, moved here by whole students.
        self.averages = {name: _all(role) for name, role in self.method.roles.items() if name in FOLLOWERS}

    def train(self, steps: int) -> dict[str, float]:
        """Go on for some steps. Returns the numbers of the first of them."""
        with self._noted():
            numbers = self._step()
        for _ in range(steps - 1):
            self._step()
        return numbers

    def _step(self) -> dict[str, float]:
        numbers = self.loop.one_step()
        moved = any(name.startswith("student/") for name in numbers)
        student = _all(self.method.roles["student"]) if self.averages and moved else {}
        for name, average in self.averages.items():
            decay = self.loop.config.ema_decay if name == "ema" else self.method.target_decay(self.loop.step - 1)
            for key, value in student.items():
                average[key].lerp_(value, 1 - decay)
        return numbers

    def resume(self, out: Path) -> None:
        """Go on from a checkpoint, of however many processes."""
        self.loop.resume(find_latest(out / "checkpoints"))

    def weights(self) -> dict[str, Tensor]:
        """Of every role, whole."""
        return _named({name: _all(role) for name, role in self.method.roles.items()})

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Inside, the first gradients of every role are kept."""
        before = {name: optimizer.held.reduce for name, optimizer in self.loop.optimizers.items()}
        for name, optimizer in self.loop.optimizers.items():
            optimizer.held.reduce = lambda name=name: self._keep(name, before[name]())  # type: ignore[method-assign]
        yield
        for name, optimizer in self.loop.optimizers.items():
            optimizer.held.reduce = before[name]  # type: ignore[method-assign]

    def _keep(self, name: str, gradients: list[Tensor]) -> list[Tensor]:
        held = self.loop.optimizers[name].held
        parameters = dict(self.method.roles[name].named_parameters())
        for key, own in zip(held.names, held.own, strict=True):
            if own.grad is not None:
                self.gradients.setdefault(f"{name}.{key}", _whole(own.grad.detach(), parameters[key]))
        return gradients


def _count(case: dict[str, Any]) -> int:
    return 4 if case.get("group") else 2


def _all(role: Role) -> dict[str, Tensor]:
    """Of a role, whole."""
    return {key: _whole(value) for key, value in role.state_dict().items()}


def _named(states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def _whole(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """All of a tensor of which this process holds a part."""
    like = tensor if like is None else like
    if not isinstance(like, DTensor):
        return tensor.detach().clone()
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, shape=like.shape, stride=like.stride()).full_tensor().clone()


def play(out: Path, case: dict[str, Any], processes: Processes) -> None:
    """One side of a case, and what it resumes: its own checkpoint of step 2, and (``other``) one process's.

    Its own is gone on from by the run that wrote it (``back``) and by another one (``again``).
    """
    run = Run(out, case, processes)
    found: dict[str, dict[str, Tensor]] = {}
    losses = {name: torch.tensor(value, dtype=torch.float64) for name, value in run.train(2).items()}
    run.loop._save()
    run.train(_STEPS - 2)
    found |= {"losses": losses, "gradients": run.gradients, "weights": run.weights()}
    found["averages"] = _named(run.averages)
    if case.get("resumed"):
        run.averages = {}
        run.resume(out)  # as a run that goes back does
        run.train(_STEPS - 2)
        found["back"] = run.weights()
        again = Run(out, case, processes)
        again.resume(out)
        again.train(_STEPS - 2)
        found["again"] = again.weights()
    if case.get("from"):
        other = Run(out.parent / "unused", case, processes)
        other.resume(out.parent / case["from"])
        other.train(_STEPS - 2)
        found["other"] = other.weights()
    if processes.rank == 0:
        for name, tensors in found.items():
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, out / f"{name}.safetensors")


def in_processes(out: Path, case: dict[str, Any]) -> None:
    """Play a case in forked processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(_count(case)):
        child = os.fork()
        if child == 0:
            try:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                dist.init_process_group("gloo", rank=rank, world_size=_count(case))
                play(out, case, Processes(rank, _count(case)))
                dist.destroy_process_group()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        sys.exit(f"a process of {out.name} failed")


def compare(one: Path, several: Path, name: str, *, floor: float = 1e-5) -> float:
    """The largest difference between both sides, relative to each tensor's largest entry.

    A tensor that is next to nothing (a key's bias has no gradient but rounding) counts as ``floor`` of the largest.
    """
    left, right = (load_file(folder / f"{name}.safetensors") for folder in (one, several))
    if left.keys() != right.keys():
        return float("inf")
    sizes = {key: float(value.double().abs().max()) for key, value in left.items()}
    least = floor * max(sizes.values())
    return max(float((left[k].double() - right[k].double()).abs().max()) / max(sizes[k], least) for k in left)


def main(out: Path, names: list[str]) -> None:
    """Both sides of some cases. A name may end in ``+resume``: then both sides go on from both sides' checkpoints."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "prompts.txt").write_text("\n".join(_PROMPTS))
    (out / "images").mkdir(exist_ok=True)
    rows = []
    for number, prompt in enumerate(_PROMPTS):
        Image.new("RGB", (64, 64), (60 * number, 90, 200 - 50 * number)).save(out / "images" / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": prompt}))
    (out / "images" / "metadata.jsonl").write_text("\n".join(rows))
    if any("pairs" in CASES[name.removesuffix("+resume")] for name in names):
        settings = {"prompts": str(out / "prompts.txt"), "num": 16, "teacher_steps": 2, "batch_size": 2}
        make_pairs(tiny_pipelines.tiny_flow(), out=str(out / "pairs"), cpu=True, **settings)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        case, resumed = CASES[name.removesuffix("+resume")], name.endswith("+resume")
        one, several = out / f"{name}_one", out / f"{name}_several"
        play(one, case, Processes())
        several.mkdir(exist_ok=True)
        in_processes(several, case | ({"resumed": True, "from": one.name} if resumed else {}))
        found[name] = {what: compare(one, several, what) for what in ("gradients", "weights")}
        found[name]["losses"] = compare(one, several, "losses", floor=1e-2)
        weights = load_file(several / "weights.safetensors")
        averages = load_file(several / "averages.safetensors")
        found[name]["averages"] = float(sum(not torch.equal(weights[key], averages[key]) for key in averages))
        if resumed:
            for what in ("again", "back"):
                theirs = load_file(several / f"{what}.safetensors")
                found[name][what] = float(sum(not torch.equal(weights[key], theirs[key]) for key in weights))
            other = load_file(several / "other.safetensors")
            save_file(other, several / "weights.safetensors")
            found[name]["one_to_several"] = compare(one, several, "weights")
            back = Run(out / "unused", case, Processes())
            back.resume(several)
            back.train(_STEPS - 2)
            save_file({k: v.contiguous() for k, v in back.weights().items()}, several / "weights.safetensors")
            found[name]["several_to_one"] = compare(one, several, "weights")
        (out / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
