"""mf-rae's golden files, compared with the trainers' own classes."""

from golden_file import GoldenFile
from mean_flow_cases import Given, check_gradient, losses, number, played, trainer


def distillation(golden: GoldenFile) -> None:
    source = golden.choice("velocity_source", "teacher", "data")
    times = {"times": "uniform", "time_max": golden.number("uniform_scale"), "time_shift": number(golden, "shift")}
    method = trainer(golden, velocity=source, **times)
    coins = {"apart": (golden["r_equals_t"] == 0).tolist(), "label_drop": [False] * len(golden["x"])}
    drawn = dict(zip("tr", golden["uniforms"].unbind(1), strict=True))
    flow, target = played(golden, method, Given(golden["noise"], drawn, coins))
    golden.check("t", flow.t)
    golden.check("r", flow.r)
    _, each = losses(method, flow, target)
    golden.check("loss_per_sample", each)
    for name in golden.expected("loss|loss_mean"):
        golden.check(name, each.mean())
    check_gradient(golden, each.mean(), method.student)


CASES = {
    "meanflow_mfrae_loss": distillation,
}
