"""Runs of the loop on a tiny method, and what they leave: weights, rows of the log, and each turn's history."""

import json
from pathlib import Path

import torch
from torch import Tensor
from toys import TinyMethod, make_loop

from fewstep.config.run import RunConfig
from fewstep.networks.roles import Role
from fewstep.training.loop import Loop
from fewstep.training.method import Renew


def config(out: Path, **settings) -> RunConfig:
    defaults = {"max_steps": 6, "batch_size": 4, "log_steps": 1, "checkpointing_steps": 100, "report_to": "none"}
    return RunConfig(teacher="tiny", out=str(out), **{**defaults, **settings})


def weights(role: Role) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in role.denoiser.network.parameters()])


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Watched(TinyMethod):
    """Notes every role's weights before each turn and after the last."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.history: list[tuple[int, str, dict[str, Tensor]]] = []

    def turns(self, step, batch):
        for turn in super().turns(step, batch):
            before = {name: weights(role) for name, role in self.roles.items()}
            yield turn
            self.history.append((step, type(turn).__name__ if isinstance(turn, Renew) else turn.role, before))


def run(out: Path, method: TinyMethod | None = None, **settings) -> Loop:
    loop = make_loop(method or TinyMethod(), config(out, **settings))
    loop.run()
    return loop
