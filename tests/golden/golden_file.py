"""One golden file: its tensors, its choices, and how closely its numbers must be met."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor
from toy_network import toy_conditioning, toy_denoiser

from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule, from_scheduler

#: Word for what a network says -> fewstep's word for it, and the sign between the two.
KINDS = {
    "edm_preconditioned": ("edm", 1),
    "epsilon": ("epsilon", 1),
    "v_prediction": ("v_prediction", 1),
    "velocity": ("flow", 1),
    "data_minus_noise": ("flow", -1),
    "trigflow": ("v_prediction", 1),
}


#: Options that say nothing more where another one has this value, though a file may give them.
IDLE = {
    ("guidance_form", "none"): "guidance_scale guidance_space guidance_t_min guidance_t_max guide_teacher guide_critic "
    "guide_critic_in_critic_loss",
    ("weighting", "uniform"): "weight_form weight_eps adaptive_p",
    ("normalizer", "none"): "normalizer_min normalizer_eps normalizer_clamp normalizer_dtype",
    ("derivative", "exact"): "derivative_step",
}


class GoldenFile:
    """A file of inputs ``in.*`` and the results ``exp.*`` that the authors' code computed from them.

    Every option and every expected tensor has to be used: a choice that the comparison does not know must not pass
    by being overlooked.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.metadata = file.metadata()
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        self.name = path.name
        self.case: str = self.metadata["case"]
        self._options: dict[str, Any] = json.loads(self.metadata["options"])
        self._unread = set(self._options)
        self._unchecked = {name for name in self.tensors if name.startswith("exp.")}
        self._tolerance = float(re.search(r"\d[\d.]*e-?\d+", self.metadata["tolerance"]).group())

    # --- inputs ---------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        """The input ``in.<name>``."""
        return self.tensors[f"in.{name}"]

    def inputs(self, prefix: str) -> list[Tensor]:
        """The inputs ``in.<prefix>0``, ``in.<prefix>1``, ..."""
        names = sorted(
            (n for n in self.tensors if re.fullmatch(rf"in\.{prefix}\d+", n)), key=lambda n: int(n[len(prefix) + 3 :])
        )
        return [self.tensors[name] for name in names]

    def states(self, name: str) -> bool:
        """Whether an option is given at all; what does not apply to a file is absent."""
        return name in self._options

    def text(self, name: str) -> str:
        """An option that is a list of words."""
        return str(self._options[name])

    def number(self, name: str) -> float:
        """An option that is a number."""
        self._unread.discard(name)
        return self._options[name]

    def choice(self, name: str, *known: Any) -> Any:
        """An option that must be one of the ``known`` values."""
        value = self._options[name]
        assert value in known, (
            f"{self.name}: unknown {name} = {value!r}; this comparison knows {', '.join(map(str, known))}"
        )
        self._unread.discard(name)
        return value

    def absent(self, name: str) -> bool:
        """Whether the file says nothing of this option, or that it does not apply."""
        absent = self._options.get(name) in (None, "none")
        if absent:
            self._unread.discard(name)
        return absent

    def loss_factor(self, x: Tensor) -> float:
        """What the file's loss is of ours, 0.5 * mean over all of ``x`` (B, ...), by its factor and its reduction."""
        return self.number("loss_factor") / 0.5 * self.over_mean(x)

    def over_mean(self, x: Tensor) -> float:
        """What the file's reduction over ``x`` (B, ...) is of the mean."""
        batch_sum = x.numel() / len(x)
        reductions = {"mean": 1.0, "sum_over_batch_size": batch_sum, "half_sum_over_batch_size": batch_sum / 2}
        reductions["sum_per_sample"] = batch_sum  # the gradients are of their mean
        return reductions[self.choice("reduction", *reductions)]

    # --- results --------------------------------------------------------------------------------------------------

    def expected(self, pattern: str) -> list[str]:
        """Names, without ``exp.``, of the results that match."""
        names = (name.removeprefix("exp.") for name in self.tensors if name.startswith("exp."))
        return sorted(name for name in names if re.fullmatch(pattern, name))

    def check(self, name: str, value: Tensor) -> None:
        """Compare with ``exp.<name>``: the largest difference, divided by the largest absolute expected entry."""
        expected = self.tensors[f"exp.{name}"]
        self._unchecked.discard(f"exp.{name}")
        value = value.detach().to(torch.float64)
        assert value.shape == expected.shape, f"{self.name}: {name} has shape {value.shape}, not {expected.shape}"
        difference = (value - expected).abs().max() / expected.double().abs().max().clamp(min=1e-300)
        assert difference <= self._tolerance, (
            f"{self.name}: {name} is {difference:.2e} off, {self._tolerance:.0e} allowed"
        )

    def check_loss(self, name: str, each: Tensor) -> None:
        """Compare ``exp.<name>`` with the losses (B,) of samples, or with their mean where it is one number."""
        self.check(name, each if self.tensors[f"exp.{name}"].dim() else each.mean())

    def finish(self) -> None:
        """Every option was read, but those that say nothing beside another, and every result compared."""
        for (name, value), idle in IDLE.items():
            if self._options.get(name) == value and name not in self._unread:
                self._unread.difference_update(idle.split())
        assert not self._unread, (
            f"{self.name}: this comparison does not know the options {', '.join(sorted(self._unread))}"
        )
        assert not self._unchecked, f"{self.name}: not compared: {', '.join(sorted(self._unchecked))}"

    # --- what many cases share ------------------------------------------------------------------------------------

    def edm_schedule(self) -> EDMSchedule:
        """The Karras ramp of the options; index i of its ascending table of K is t = i / (K - 1)."""
        self.choice("schedule", "edm")
        names = ("sigma_min", "sigma_max", "rho", "sigma_data")
        # Where noise levels are drawn directly, the ends of a ramp say nothing.
        return EDMSchedule(**{name: self.number(name) for name in names if not self.absent(name)})

    def edm_time(self, index: Tensor) -> Tensor:
        self.choice("sigma_table", "karras_ascending")
        return index.double() / (self.number("num_train_timesteps") - 1)

    def table_schedule(self, timesteps: Tensor, alphas_cumprod: Tensor, exactly: bool = True) -> TableSchedule:
        """The stock scheduler's table, with the source's own entries where it used them."""
        self.choice("schedule", "vp")
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        scheduler = diffusers.DDPMScheduler(**{name: self.number(name) for name in names})
        schedule, _ = from_scheduler(scheduler)
        if exactly:
            torch.testing.assert_close(schedule.alphas_cumprod[timesteps], alphas_cumprod, rtol=1e-5, atol=0)
        exact = schedule.alphas_cumprod.clone()
        exact[timesteps] = alphas_cumprod
        return TableSchedule(exact)

    def flow_schedule(self) -> FlowSchedule:
        self.choice("schedule", "rf")
        return FlowSchedule()

    def denoiser(self, coefficients: str, schedule: NoiseSchedule) -> Any:
        """The toy network with coefficients ``in.<coefficients>``, run by the project's own NetworkDenoiser."""
        kind, sign = self.kind("prediction_type")
        return toy_denoiser(self[coefficients], schedule, kind, self.toy_time(schedule), sign)

    def kind(self, option: str) -> tuple[str, int]:
        """What the networks of the file say in fewstep's words, and the sign that makes it so."""
        return KINDS[self.choice(option, *KINDS)]

    def toy_time(self, schedule: NoiseSchedule) -> Callable[[Tensor], Tensor]:
        """What makes the toy network's time of the schedule's timestep."""
        name = self.choice("toy_time", "ln(sigma)/4", "timestep/1000", "t", "sin(t)/(sin(t)+cos(t))")
        if name == "timestep/1000":
            return lambda timestep: timestep / 1000
        if name == "sin(t)/(sin(t)+cos(t))":
            return lambda timestep: schedule.flow_time(schedule.time(timestep))
        if name == "ln(sigma)/4" and not isinstance(schedule, EDMSchedule):
            return lambda timestep: -schedule.log_snr(schedule.time(timestep)) / 8
        if name == "t" and isinstance(schedule, EDMSchedule):
            return lambda timestep: (4 * timestep).exp()  # EDM's time is the noise level itself
        if name == "t" and isinstance(schedule, TableSchedule | FlowSchedule):
            return schedule.time
        return lambda timestep: timestep  # EDM's timestep is ln(sigma)/4 itself, TrigFlow's its angle

    def conditioning(self, name: str = "cond") -> Any:
        return toy_conditioning(self[name])
