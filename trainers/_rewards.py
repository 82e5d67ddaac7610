"""Opening what rewards a student: scorers of ``fewstep eval`` by name or by a safetensors file, and dotted classes."""

from __future__ import annotations

import importlib
import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep.config.reward import KNOWN, RewardConfig
from fewstep.data.batch import Asked
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError, one_line
from fewstep.eval.scorers.rewards import open_known_reward, open_reward_file
from fewstep.eval.weights import VARIABLE, Weights
from fewstep.training.method import Bench
from fewstep.training.rewards import Reward, Rewards

#: Rewards by name that compare a picture with its prompt.
READ_PROMPTS = ("clip", "hps", "pick")


def open_rewards(config: RewardConfig, bench: Bench, teacher: Denoiser) -> Rewards | None:
    """What a run's student is rewarded by; None without ``--reward``. How it is used: :mod:`fewstep.training.rewards`.

    Args:
        config: of the run.
        bench: that its method is prepared at.
        teacher: unguided, for the metric that is not optimised where no other is given.

    Raises:
        UserError: a reward cannot be opened, or the teacher makes no pictures.
    """
    if config.reward is None:
        return None
    for name in (*config.rewards, config.reward_beside):
        if name in READ_PROMPTS and bench.recording.conditional in ("label", None):
            raise UserError(
                f"the reward {name} reads prompts, and this teacher takes none; give another one, such as aesthetic"
            )
    opened = {name: bench.open_reward(partial(_open, name, config)) for name in config.rewards}
    dry = None in opened.values()
    rewards = {_short(name): reward or _plain for name, reward in opened.items()}
    own = config.reward_beside == "teacher"
    beside = None if own else bench.open_reward(partial(_open, config.reward_beside, config))
    looks = 0 if dry else config.reward_look_steps
    return Rewards(config, rewards, beside, _short(config.reward_beside), bench.pictures(), teacher, looks)


def _open(name: str, config: RewardConfig, device: torch.device) -> Reward:
    if name in KNOWN or name.endswith(".safetensors"):
        path = Path(name)
        if name not in KNOWN and not path.is_file():
            raise UserError(f"--reward {name} is no file; give one of {', '.join(KNOWN)}, or where its file lies")
        # Beside a file lies what it needs, if nobody says where.
        beside = None if name in KNOWN or os.environ.get(VARIABLE) else path.parent
        folder = beside if config.reward_files is None else Path(config.reward_files)
        try:
            weights = Weights(folder)
            return (
                open_known_reward(name, weights, device) if name in KNOWN else open_reward_file(path, weights, device)
            )
        except UserError as error:
            raise type(error)(str(error).replace("--weights", "--reward_files")) from error
    return _dotted(name, device)


def _dotted(name: str, device: torch.device) -> Reward:
    module, _, attribute = name.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), attribute)(device)
    except Exception as error:  # a class of the user's raises whatever it does
        raise UserError(f"--reward {name} cannot be made: {one_line(error)}; it is called with (device)") from error
    if not callable(made):
        raise UserError(f"--reward {name} makes nothing that can be called with pictures and what they were asked for")
    reward: Reward = made
    return reward


def _short(name: str) -> str:
    """For the log: ``PickScore`` of my.rewards.PickScore, ``model`` of PickScore/model.safetensors."""
    return Path(name).stem if name.endswith(".safetensors") else name.rpartition(".")[2]


def _plain(pictures: Tensor, asked: Asked) -> Tensor:
    """A number of each picture for a dry run, in which nothing is looked at."""
    return pictures.flatten(1).mean(1)
