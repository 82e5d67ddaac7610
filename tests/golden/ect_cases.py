"""Golden files of Easy Consistency Tuning, compared with what the trainer is made of."""

from consistency_trainer import NATURAL, check_gradient, huber_c, mapping_k, schedule_of, trainer, weighted
from golden_file import GoldenFile

from fewstep.diffusion.discretization import EasyTimes, SigmaRange, ect_gap, ect_mapping


def ect_loss(golden: GoldenFile) -> None:
    golden.choice("target_at_r_zero", "clean_data")
    golden.choice("time_sampler", "log_normal")
    schedule = schedule_of(golden)
    method = trainer(golden, schedule, NATURAL, variant="ect", huber_c=huber_c(golden, "c"))
    times = EasyTimes(
        SigmaRange(schedule),
        stage_steps=1,
        q=golden["q"].item(),
        k=mapping_k(golden),
        b=golden.number("mapping_b"),
        mean=golden.number("p_mean"),
        std=golden.number("p_std"),
    )
    pair = times.neighbours(golden["normal"], int(golden["stage"]))
    golden.check("t", pair.sigma_t)
    golden.check("r", pair.sigma_r)
    seen = method.compare(golden["x"], golden["noise"], pair, golden.conditioning())
    _, loss = weighted(golden, method, seen, pair)
    golden.check("loss_per_sample", loss)
    total = golden.over_mean(golden["x"]) * loss.mean()
    golden.check("loss_mean", total)
    check_gradient(golden, method, total)


def ect_time_mapping(golden: GoldenFile) -> None:
    golden.choice("schedule", "edm")
    k = mapping_k(golden)
    for name in golden.expected(r"r\.q.+\.stage\d+"):
        q, stage = name.removeprefix("r.q").split(".stage")
        golden.check(name, ect_mapping(golden["t"], ect_gap(int(stage), float(q)), k, golden.number("mapping_b")))


CASES = {
    "ect_loss": ect_loss,
    "ect_time_mapping": ect_time_mapping,
}
