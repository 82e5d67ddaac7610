"""Golden files of TCD, PCM and TSCD, compared with what the trainer is made of."""

import torch
from consistency_trainer import SOLVERS, given, network
from diffusers import TCDScheduler
from golden_file import GoldenFile
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.discretization import EvenTimes, SigmaRange, TimePair
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import TableSchedule
from fewstep.diffusion.segments import Segments, Stage, cut
from fewstep.losses.consistency import DISTANCES
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.segmented_consistency import Jumps, SegmentedConsistency, SegmentedConsistencyConfig

FORMS = ("none", "u+w*(c-u)", "c+w*(c-u)")


def value(golden: GoldenFile, name: str, default: float) -> float:
    """A number that is an option in one file and a tensor in another."""
    if given(golden, name) and not golden.absent(name):
        return golden.number(name)
    return golden[name].item() if f"in.{name}" in golden.tensors else default


def trainer(golden: GoldenFile, schedule: TableSchedule) -> SegmentedConsistency:
    """The trainer's own class on toy networks, told the file's choices."""
    golden.choice("target_detached", True)
    distance = golden.choice("distance", *DISTANCES)
    solver = SOLVERS[golden.choice("solver", "ddim", "euler", "heun")]
    huber_c = value(golden, "huber_c", 0.0)
    own = {"huber_c": huber_c} if "huber" in distance else {}
    config = SegmentedConsistencyConfig(teacher="toy", out="out", distance=distance, solver=solver, **own)
    roles = {"student": network(golden, "k_student", schedule)}
    if golden.choice("target_network", "student", "separate") == "separate":
        roles["target"] = network(golden, "k_target", schedule)
    on = golden.choice("guide_teacher", True, False) if given(golden, "guide_teacher") else True
    on = golden.choice("guidance_form", *FORMS) != "none" and on
    teacher = GuidedDenoiser(network(golden, "k_teacher", schedule), 1.0, further=1 if on else 0)
    return SegmentedConsistency(config, roles, teacher, Sampler(schedule, (1.0,), "ode"), [])


def scale(golden: GoldenFile, low: float, high: float) -> Tensor | None:
    """The teacher's guidance of each sample, in our convention; None where it has none."""
    form = golden.choice("guidance_form", *FORMS)
    if form == "none" or (given(golden, "guide_teacher") and not golden.choice("guide_teacher", True, False)):
        return None
    return low + golden["uniform_w"] * (high - low) + (form == "c+w*(c-u)")


def grid_of(golden: GoldenFile, count: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """The table's entries at both ends of intervals of the grid."""
    spacing = golden.number("num_train_timesteps") // count
    upper = spacing * (index + 1) - 1
    return upper, (upper - spacing).clamp(min=0)


def check_jumps(
    golden: GoldenFile, method: SegmentedConsistency, pair: TimePair, end: Tensor, w: Tensor | None
) -> Jumps:
    """Neighbour, both jumps, the loss and its gradient, of the student alone."""
    seen = method.jumps(golden["x"], golden["noise"], pair, end, golden.conditioning(), w)
    golden.check("timestep", method.schedule.timestep(pair.t).round())
    golden.check("timestep_prev", method.schedule.timestep(pair.r).round())
    golden.check("end_timestep", method.schedule.timestep(end).round())
    golden.check("x_prev", seen.x_r)
    golden.check("model_pred", seen.student)
    golden.check("target", seen.target)
    apart = method.distance(seen)
    reductions = ("mean", "sum_per_sample", "sum_over_batch_size", "half_sum_over_batch_size")
    reduction = golden.choice("reduction", *reductions)
    size = seen.student[0].numel()
    loss = apart if reduction == "sum_per_sample" else apart.mean()
    factor = {"mean": 1.0, "half_sum_over_batch_size": size / 2}.get(reduction, float(size))
    golden.check("loss", factor * loss)
    (factor * loss).mean().backward()
    golden.check("grad_k_student", method.student.network.k.grad)
    outside = [method.teacher.denoiser] + [method.target] * (method.target is not method.student)
    assert all(other.network.k.grad is None for other in outside)
    return seen


def tscd_loss(golden: GoldenFile) -> None:
    count, total = golden.number("num_grid"), golden.number("num_train_timesteps")
    upper, lower = grid_of(golden, count, golden["index"])
    segments = int(golden["num_segments"])
    # The source cuts the timesteps themselves into equal lengths, whose ends are no times of its grid.
    starts = torch.tensor([j * total // segments for j in range(segments + 1)])
    names = {"start": upper, "prev": lower}
    bounds = Segments(tuple(((starts + 1) / total).double().tolist()))
    length = bounds.lower((upper + 1).double() / total) * total - 1
    first = length.round().long()
    end = first + golden["draw"] % (lower - first)
    entries = torch.cat([*names.values(), end])
    products = torch.cat([*(golden[f"abar_{name}"] for name in names), golden["abar_end"]])
    schedule = golden.table_schedule(entries, products)
    method = trainer(golden, schedule)
    levels = SigmaRange(schedule)
    t, r = schedule.time(upper), schedule.time(lower)
    pair = TimePair(t, r, levels.at(t), levels.at(r))
    w = scale(golden, value(golden, "w_min", 0.0), value(golden, "w_max", 0.0))
    check_jumps(golden, method, pair, schedule.time(end), w)


def pcm_loss(golden: GoldenFile) -> None:
    # A jump from an edge to itself is the identity, whichever way that is computed.
    golden.choice("target_at_edge", "x_prev", "jump")
    count, phases = int(value(golden, "num_grid", 50)), int(value(golden, "num_phases", 1))
    every, before = grid_of(golden, count, torch.arange(count))
    entries = torch.cat([every, before, before[golden["index"]]])
    products = torch.cat([golden["abar_grid"], golden["abar_grid_prev"], golden["abar_target_time"]])
    schedule = golden.table_schedule(entries, products)
    grid = EvenTimes(SigmaRange(schedule), [count + 1])
    times = grid.times(0)
    stage = Stage(grid, cut(times.tolist(), phases, evenly=False), to_edge=True)
    of_every = stage.end(schedule, grid.neighbours(times, torch.arange(count)), None)
    golden.check("end_timestep_of_every_index", schedule.timestep(of_every).round())
    pair = grid.neighbours(times, golden["index"])
    end = stage.end(schedule, pair, None)
    low, high = golden["w_range"].tolist() if "in.w_range" in golden.tensors else (0.0, 0.0)
    method = trainer(golden, schedule)
    check_jumps(golden, method, pair, end, scale(golden, low, high))
    golden.check("target_is_x_prev", (pair.r == end).double())


def tcd_sampler(golden: GoldenFile) -> None:
    golden.choice("guidance_form", "none")
    stock = TCDScheduler(original_inference_steps=golden.number("num_grid"))
    stock.set_timesteps(int(golden["num_steps"]))
    timesteps = stock.timesteps
    golden.check("timesteps", timesteps)
    eta, zero = golden["eta"].item(), torch.zeros(1, dtype=torch.int64)
    back = torch.floor((1 - eta) * torch.cat([timesteps[1:], zero])).long()
    products = torch.cat([golden["abar_timesteps"], golden["abar_0"][None], golden["abar_s"]])
    schedule = golden.table_schedule(torch.cat([timesteps, zero, back]), products)
    student, inputs = golden.denoiser("k", schedule), []
    sampler = Sampler(schedule, tuple(schedule.time(timesteps).tolist()), "tcd", 1.0, eta)

    def watched(x_t: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor | None = None) -> Tensor:
        inputs.append((x_t, t))
        return student(x_t, t, conditioning)

    def noise(step: int) -> Tensor:
        return golden["noises"][step - 1]

    last = rollout(watched, sampler, golden["x_init"], golden.conditioning(), noise)
    golden.check("trajectory", torch.stack([*(x for x, _ in inputs), last]))
    config = SegmentedConsistencyConfig(teacher="toy", out="out")
    method = SegmentedConsistency(config, {"student": student}, None, sampler, [])
    ends = schedule.time(back)
    seen = [
        method.jump(student, x, t, end.expand(len(t)), golden.conditioning())
        for (x, t), end in zip(inputs, ends, strict=True)
    ]
    golden.check("denoised", torch.stack(seen))


CASES = {"tcd_sampler": tcd_sampler, "pcm_loss": pcm_loss, "tscd_loss": tscd_loss}
