"""One training loop for all four networks: AdamW, one-cycle learning rate, averaged weights, checkpoints, progress."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.data.durable import write_durably
from fewstep.errors import UserError

Network = TypeVar("Network", bound=nn.Module)
CHECKPOINT_SECONDS = 120
WARMUP_FRACTION = 0.1


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    ``ema_decay`` 0 ships the last weights as they are. ``cycle``: steps of the learning rate's cycle, where training
    ends within it and leaves the rest to the average; 0 is all steps.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    ema_decay: float = 0.0
    clip: float = 1.0
    cycle: int = 0


def one_cycle(step: int, steps: int) -> float:
    """Factor of the peak learning rate: a linear rise over the first tenth, then a cosine to zero."""
    warmup = WARMUP_FRACTION * steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _pack(model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    packed = {f"model.{name}": value for name, value in model.state_dict().items()}
    packed |= {f"average.{name}": value for name, value in average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        packed |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    return {name: value.detach().clone().contiguous() for name, value in packed.items()}


def _unpack(
    packed: dict[str, Tensor], model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    model.load_state_dict({k.removeprefix("model."): v for k, v in packed.items() if k.startswith("model.")})
    for name in average:
        average[name] = packed[f"average.{name}"]
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in packed.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            states.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def train(
    name: str,
    model: Network,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    examples: int,
    plan: Plan,
    work: Path,
) -> Network:
    """Train ``model`` in place, resuming from ``work/<name>.checkpoint.safetensors`` when that is there.

    Each step's indices and noise depend on (step) alone, so a resumed run continues as if it had not been stopped.

    Args:
        loss: called with indices int64 (B,) into the examples and the step's generator; returns a scalar.
        examples: how many examples there are; each batch is drawn from all of them.

    Returns:
        The model with its averaged weights, in eval mode.

    Raises:
        UserError: when the checkpoint is broken or was written under another plan.
    """
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / f"{name}.checkpoint.safetensors"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=plan.betas, weight_decay=plan.weight_decay
    )
    average = {key: value.detach().clone() for key, value in model.named_parameters()} if plan.ema_decay else {}
    first, seconds_before = 0, 0.0
    if checkpoint.is_file():
        try:
            with safe_open(checkpoint, framework="pt") as file:
                where = file.metadata()
        except SafetensorError as error:
            raise UserError(f"{checkpoint} is broken ({error}): remove it to start that part again") from error
        if where["plan"] != repr(plan):
            raise UserError(f"{checkpoint} belongs to another plan: remove it, or pass another --work")
        first, seconds_before = int(where["step"]), float(where["seconds"])
        _unpack(load_file(checkpoint), model, average, optimizer)

    started = saved = time.monotonic()

    def save(step: int) -> None:
        seconds = seconds_before + time.monotonic() - started
        where = {"step": str(step), "seconds": f"{seconds:.1f}", "plan": repr(plan)}
        packed = _pack(model, average, optimizer)
        write_durably(checkpoint, lambda path: save_file(packed, path, metadata=where))

    model.train()
    running: float | None = None
    bar = tqdm(range(first, plan.steps), desc=name, initial=first, total=plan.steps, mininterval=10)
    for step in bar:
        generator = torch.Generator().manual_seed(step + 1)
        indices = torch.randint(examples, (plan.batch_size,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * one_cycle(step, plan.cycle or plan.steps)
        value = loss(indices, generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        if torch.isfinite(norm):
            optimizer.step()
        # A young average follows the weights closely; it slows down to the plan's decay.
        decay = min(plan.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, parameter in model.named_parameters() if average else ():
                average[key].lerp_(parameter, 1 - decay)
        if step % 20 == 0:
            running = value.item() if running is None else 0.9 * running + 0.1 * value.item()
            bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            save(step + 1)
            saved = time.monotonic()
    if first < plan.steps:
        save(plan.steps)
    with torch.no_grad():
        for key, parameter in model.named_parameters() if average else ():
            parameter.copy_(average[key])
    return model.eval()
