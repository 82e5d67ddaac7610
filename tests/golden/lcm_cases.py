"""Golden files of Latent Consistency Models, compared with what the trainer is made of."""

import torch
from consistency_trainer import check_gradient, huber_c, trainer, weighted
from diffusers import LCMScheduler
from golden_file import GoldenFile
from torch import Tensor
from toy_network import toy_conditioning
from vocabulary import MORE, guided

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.discretization import EvenTimes, SigmaRange
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.losses.consistency import lcm_scalings
from fewstep.networks.guidance_embedding import guidance_embedding
from fewstep.trainers.consistency import Boundary, Consistency, ConsistencyConfig


def lcm_boundary(golden: GoldenFile, schedule: NoiseSchedule) -> Boundary:
    scaling, sigma_data = golden.number("timestep_scaling"), golden.number("sigma_data")
    return lambda t: lcm_scalings(schedule.timestep(t), scaling, sigma_data)


def lcm_loss(golden: GoldenFile) -> None:
    if not golden.absent("guidance_space"):  # of which each, for a linear conversion at one x_t, is guided x0
        golden.choice("guidance_space", "x0_and_epsilon", "x0", "epsilon", "v_prediction", "velocity")
    grid_size, count = golden.number("num_grid"), golden.number("num_train_timesteps")
    upper = (count // grid_size) * (golden["index"] + 1) - 1
    lower = (upper - count // grid_size).clamp(min=0)
    entries, products = torch.cat([upper, lower]), torch.cat([golden["abar_start"], golden["abar_prev"]])
    torch.testing.assert_close(golden["abar_prev"], golden["abar_target"], rtol=0, atol=0)
    schedule = golden.table_schedule(entries, products)
    boundary = lcm_boundary(golden, schedule)
    method = trainer(golden, schedule, boundary, variant="lcm", huber_c=huber_c(golden))

    grid = EvenTimes(SigmaRange(schedule), [grid_size + 1])
    pair = grid.neighbours(grid.times(0), golden["index"])
    golden.check("timestep", schedule.timestep(pair.t).round())
    golden.check("timestep_prev", schedule.timestep(pair.r).round())
    for name, t in (("start", pair.t), ("target", pair.r)):
        skip, out = boundary(t)
        golden.check(f"c_skip_{name}", skip)
        golden.check(f"c_out_{name}", out)

    # An embedding's w is that of c + w (c - u), which the project's function takes as diffusers does: one more.
    student_cond, scale = golden["cond"], None
    if "in.w_range" in golden.tensors:
        low, high = golden["w_range"]
        w = low + golden["uniform_w"] * (high - low)
        golden.check("w", w)
        more = MORE[golden.choice("guidance_form", *MORE)]
        scale = None if more is None else w + more
    if not golden.absent("w_embedding"):
        golden.choice("w_embedding", "sinusoidal_sin_cos")
        size, period = golden.number("w_embedding_dim"), golden.number("w_embedding_max_period")
        embedding = guidance_embedding(w + 1, size, period, golden.number("w_embedding_scale"))
        golden.check("w_embedding", embedding)
        golden.choice("toy_condition", "cond+factor*w_embedding[:,column]")
        column = embedding[:, golden.number("toy_condition_column")]
        student_cond = student_cond + golden.number("toy_condition_factor") * column

    # The teacher of these files is not told the guidance: what student and target are given is put in behind it.
    for role in {id(role): role for role in (method.student, method.target)}.values():
        answer = role.raw
        role.raw = lambda x, t, _conditioning, answer=answer: answer(x, t, toy_conditioning(student_cond))
    on = not golden.absent("guide_teacher") and golden.choice("guide_teacher", True, False)
    seen = method.compare(golden["x"], golden["noise"], pair, golden.conditioning(), scale if on else None)
    golden.check("x_prev", seen.x_r)
    golden.check("model_pred", seen.f)
    golden.check("target", seen.target)
    each = golden.over_mean(golden["x"]) * weighted(golden, method, seen, pair)[1]
    golden.check_loss("loss", each)
    check_gradient(golden, method, each.mean())


def lcm_sampler(golden: GoldenFile) -> None:
    golden.choice("final_step", "denoised")
    stock = LCMScheduler(original_inference_steps=golden.number("num_grid"))
    stock.set_timesteps(int(golden["num_steps"]))
    timesteps = stock.timesteps
    schedule = golden.table_schedule(timesteps, golden["abar_timesteps"])
    golden.check("timesteps", timesteps)
    method = Consistency(
        ConsistencyConfig(teacher="toy", out="out"),
        {"student": guided(golden, golden.denoiser("k", schedule))},
        None,
        Sampler(schedule, tuple(schedule.time(timesteps).tolist()), "fresh"),
        None,
        lcm_boundary(golden, schedule),
    )
    f, inputs, outputs = method.function(method.student), [], []

    def watched(x_t: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor | None = None) -> Tensor:
        inputs.append(x_t)
        outputs.append(f(x_t, t, conditioning))
        return outputs[-1]

    x0 = rollout(watched, method.sampler, golden["x_init"], golden.conditioning(), lambda k: golden["noises"][k - 1])
    golden.check("trajectory", torch.stack([*inputs, x0]))
    golden.check("denoised", torch.stack(outputs))


CASES = {
    "lcm_distillation_loss": lcm_loss,
    "lcm_sampler": lcm_sampler,
}
