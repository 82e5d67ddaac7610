"""Golden files of what all methods share."""

from golden_file import GoldenFile
from torch import Tensor

from fewstep.diffusion.prediction import convert
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TrigFlowSchedule


def prediction_conversions(golden: GoldenFile) -> None:
    data = golden.number("sigma_data")  # TrigFlow's noise has that scale, and its networks know the scaled one
    # The source's flow is dx_t/dt in each schedule's own time, which is another of our words in each.
    golden.choice("flow", "dx/dt")
    edm, trig = EDMSchedule(sigma_min=1e-3, sigma_max=100.0), TrigFlowSchedule()
    families: dict[str, tuple[NoiseSchedule, Tensor, str]] = {
        "edm": (edm, edm.time_from_sigma(golden["t.edm"]), "epsilon"),
        "rf": (FlowSchedule(), golden["t.rf"], "flow"),
        "trig": (trig, trig.time(golden["t.trig"]), "v_prediction"),
    }
    for family, (schedule, t, flow) in families.items():
        kinds = {"x0": "sample", "eps": "epsilon", "flow": flow}
        alpha, sigma = schedule.coefficients(t)
        golden.check(f"{family}.alpha", alpha)
        scale = data if family == "trig" else 1.0
        golden.check(f"{family}.sigma", scale * sigma)
        for name in golden.expected(rf"{family}\.\w+_to_\w+"):
            source, target = name.removeprefix(f"{family}.").split("_to_")
            output = golden["output"] * (scale if source == "eps" else 1.0)
            converted = convert(output, kinds[source], kinds[target], golden["x_t"], schedule, t)
            golden.check(name, converted / (scale if target == "eps" else 1.0))


CASES = {"prediction_conversions": prediction_conversions}
