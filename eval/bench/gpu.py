"""What is to be measured on a GPU, in the order of its weight, each in a process with a time box; ten minutes in all.

    python -m fewstep.eval.bench.gpu [OUT]       default OUT: runs/gpu-bench

Every number is written the moment that it is known, so that a box that ends early keeps what it has. What was not
reached is listed. Without a GPU it says so, and ends well.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.data.durable import as_json, write_text_durably
from fewstep.eval.bench import calls, kernels, peers, steps
from fewstep.eval.bench.timing import Clock, Spread, alternate, machine, ratios
from fewstep.eval.memory.__main__ import measure as measured_memory
from fewstep.kernels import dispatch, score_gap
from fewstep.kernels.adamw import adamw
from fewstep.kernels.dual_attention import dual_attention, example
from fewstep.kernels.updates import Follower, Moments, Rule

TOTAL = 600.0
GPU = torch.device("cuda")
_BLOCKS = 7


def attention() -> None:
    """Dual attention in bfloat16 beside torch's forward pass, and beside its plain derivative."""
    for length, size in [(n, d) for n in (1024, 4096, 16384) for d in (64, 128)]:
        inputs = _attention_inputs((1, 8, length, size))
        q, k, v = (inputs[name] for name in ("query", "key", "value"))
        works: dict[str, Callable[[], object]] = {"plain": partial(F.scaled_dot_product_attention, q, k, v)}
        works |= {form: partial(_forced, form, dual_attention, inputs) for form in ("closed", "triton")}
        seconds = alternate(works, Clock(GPU), _BLOCKS, budget=20.0)
        for form in ("closed", "triton"):
            times = Spread.of([own / plain for own, plain in zip(seconds[form], seconds["plain"])])
            say(goal=14, length=length, size=size, form=form, times_forward=vars(times), target="<= 3.5")
    inputs = _attention_inputs((1, 8, 2048, 64))
    names = ("query", "key", "value")
    point, change = (tuple(inputs[name + end] for name in names) for end in ("", "_change"))

    def plainly() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(F.scaled_dot_product_attention, point, change)

    own = partial(_forced, "triton", dual_attention, inputs)
    seconds = alternate({"own": own, "plain": plainly}, Clock(GPU), _BLOCKS)
    say(goal=14, length=2048, gain=vars(ratios(seconds["plain"], seconds["own"])), target=">= 8")
    say(goal=14, length=2048, memory=_peak(plainly) / max(1, _peak(own)), target=">= 15")
    for shape, keys in (((1, 8, 32760, 64), 32760), ((1, 8, 1023, 64), 77)):
        inputs = _attention_inputs(shape)
        inputs |= {name: value[..., :keys, :] for name, value in inputs.items() if name.startswith(("key", "value"))}
        answer = _forced("triton", dual_attention, inputs)
        finite = all(bool(torch.isfinite(part).all()) for part in answer if isinstance(part, torch.Tensor))
        say(goal=14, shape=shape, keys=keys, finite=finite)


def optimizer() -> None:
    """Clip, AdamW and an average of 2.57 billion float32 parameters, beside the three apart."""
    shapes = [(4096, 4096)] * 153
    p, g, average = ([torch.randn(shape, device=GPU) for shape in shapes] for _ in range(3))
    count = sum(one.numel() for one in p)
    parameters = [torch.nn.Parameter(one) for one in p]
    theirs = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    moments, follower = Moments(p), Follower(average, 0.01)

    def apart() -> None:
        for parameter, gradient in zip(parameters, g):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        theirs.step()
        torch._foreach_lerp_(average, p, 0.01)

    def together() -> None:
        scale = (1.0 / (torch.nn.utils.get_total_norm(g) + 1e-6)).clamp(max=1.0)
        with dispatch.forced("triton"):
            adamw(moments, g, Rule(lr=1e-6), scale=scale, followers=[follower])

    seconds = alternate({"apart": apart, "together": together}, Clock(GPU), _BLOCKS, budget=40.0)
    share = Spread.of([one / other for one, other in zip(seconds["together"], seconds["apart"])])
    bound = 40 * count / _bandwidth()
    say(goal=16, parameters=count, share=vars(share), target="<= 0.7")
    say(goal=16, times_of_bound=Spread.of(seconds["together"]).median / bound, target="<= 1.25")


def loss() -> None:
    """The score gap at a video latent: kernels, bytes, and the share of the bandwidth of a copy."""
    inputs = score_gap.example((1, 16, 21, 60, 104), torch.float32, GPU)
    entries = inputs["x0_critic"].numel()
    forms = {form: partial(_forced, form, score_gap.score_gap, inputs) for form in dispatch.FORMS}
    seconds = alternate(forms, Clock(GPU), 20)
    for form, work in forms.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        launched = sum(event.count for event in profiler.key_averages())
        taken = Spread.of(seconds[form])
        # Three samples in, the gradient out.
        share = 16 * entries / taken.median / _bandwidth()
        say(goal=15, form=form, kernels=launched, seconds=vars(taken), bandwidth=share, target="<= 4 kernels, >= 0.7")


def adapters(folder: Path) -> None:
    """LoRA roles beside full copies: the most that is held, and the time of a DMD2 cycle."""
    taken = {rank: measured_memory("unet", lora_rank=rank) for rank in (0, 16)}
    say(goal=12, network="UNet of 135 M", memory=taken[16] / taken[0], target="<= 0.25 on a DiT of 1.3 B")
    one, other = steps.measure_cases(GPU, folder, _BLOCKS, 60.0, steps.CASES[:2], "unet")
    say(goal=12, network="UNet of 135 M", time=other.seconds.median / one.seconds.median, target="<= 1.0")


def cycle(folder: Path) -> None:
    """Training steps in F, and beside the same in another order."""
    for table in (
        peers.measure(GPU, folder / "peers", blocks=_BLOCKS, shape="unet"),
        steps.measure(GPU, folder / "cases", blocks=3, budget=60.0, shape="unet"),
    ):
        say(goal=11, **table.as_dict())


def rest(_folder: Path) -> None:
    """Every operation in every form, and all calls."""
    for table in (kernels.measure(GPU, full=True, compiled=True), calls.measure()):
        say(goal="rest", **table.as_dict())


#: What is measured, in this order, and the seconds of its box.
BOXES: Mapping[str, tuple[Callable[..., None], float]] = {
    "attention (14)": (lambda _folder: attention(), 150.0),
    "optimizer (16)": (lambda _folder: optimizer(), 90.0),
    "loss (15)": (lambda _folder: loss(), 60.0),
    "adapters (12)": (adapters, 120.0),
    "cycle (11)": (cycle, 120.0),
    "the rest": (rest, 120.0),
}


def main(words: Sequence[str]) -> int:
    """The command line of this file. Returns the exit code: 1 where a box failed."""
    if words[:1] == ["child"]:
        BOXES[words[1]][0](Path(words[2]))
        return 0
    if not torch.cuda.is_available():
        print("gpu-bench is skipped: there is no GPU that torch can use")
        return 0
    out = Path(words[0] if words else "runs/gpu-bench")
    command = [sys.executable, "-W", "ignore", "-m", "fewstep.eval.bench.gpu", "child"]
    boxes = {name: ([*command, name, str(out / "work" / str(k))], BOXES[name][1]) for k, name in enumerate(BOXES)}
    found = run_boxes(boxes, TOTAL, out)
    write_text_durably(out / "gpu.json", json.dumps({"machine": machine(GPU), **found}, indent=1) + "\n")
    for name, about in found["boxes"].items():
        print(f"{name}: {about['state']}, {len(about['numbers'])} numbers")
        for number in about["numbers"]:
            print(f"  {json.dumps(number)}")
    print(f"not reached: {', '.join(found['not_reached']) or 'nothing'}")
    return int(any(about["state"].startswith("failed") for about in found["boxes"].values()))


def run_boxes(boxes: Mapping[str, tuple[Sequence[str], float]], total: float, out: Path) -> dict[str, Any]:
    """Run one process after the other, each for its seconds at most, and all for ``total``.

    Args:
        boxes: by name the command, and its seconds.
        total: seconds of all.
        out: folder of what they say.
    """
    out.mkdir(parents=True, exist_ok=True)
    end, found, not_reached = time.monotonic() + total, {}, []
    for place, (name, (command, seconds)) in enumerate(boxes.items()):
        left = min(seconds, end - time.monotonic())
        if left < 1:
            not_reached.append(name)
            continue
        said, errors = out / f"{place}.jsonl", out / f"{place}.log"
        with said.open("w") as stdout, errors.open("w") as stderr:
            try:
                code = subprocess.run(command, stdout=stdout, stderr=stderr, timeout=left).returncode
                state = "done" if code == 0 else f"failed with code {code}, see {errors}"
            except subprocess.TimeoutExpired:
                state = "ended by its time box"
                not_reached.append(f"{name} in part")
        lines = [line for line in said.read_text().splitlines() if line.startswith("{")]
        found[name] = {"state": state, "numbers": [json.loads(line) for line in lines if line.endswith("}")]}
    return {"boxes": found, "not_reached": not_reached}


def say(**numbers: Any) -> None:
    """Write down a number, as one line."""
    print(json.dumps(as_json(numbers)), flush=True)


def _forced(form: str, operation: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    with dispatch.forced(form), torch.no_grad():
        return operation(**inputs)


def _attention_inputs(shape: tuple[int, ...]) -> dict[str, Any]:
    return {name: value.detach() for name, value in example(shape, torch.bfloat16, GPU).items()}


def _peak(work: Callable[[], object]) -> int:
    """Bytes that a piece of work takes beyond what was there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _bandwidth() -> float:
    """Bytes read and written in a second by a copy of one gigabyte."""
    one = torch.empty(2**28, device=GPU)
    other = torch.empty_like(one)
    seconds = alternate({"copy": lambda: other.copy_(one)}, Clock(GPU), 10)["copy"]
    return 2 * one.nbytes / Spread.of(seconds).median


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
