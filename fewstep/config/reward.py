"""Settings of methods whose student may be rewarded for its pictures."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from fewstep.config.checks import setting
from fewstep.config.run import RunConfig
from fewstep.errors import UserError

#: What ``--reward`` knows by name: the scorers of ``fewstep eval`` that are differentiable.
KNOWN = ("aesthetic", "clip", "hps", "pick")
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


@dataclass(kw_only=True)
class RewardConfig(RunConfig):
    """A run of a method whose student may be rewarded.

    Args:
        reward: what rewards the pictures of the student's last step, several with commas between them: a scorer of
            fewstep eval (clip, pick, hps, aesthetic), a safetensors file of one of them, or a dotted class that is
            called with pictures and what they were asked for (fewstep.fashion.rewards.ClassProbability).
        reward_weight: weight of the reward's loss in the student's (DMDR: 0.05; RTDMD: 1e-4 to 1e-3).
        reward_shares: weight of each reward in their sum; default 1.
        reward_margin: pictures above it are left in peace: one margin, of the weighted sum, or one for each reward
            (Hyper-SD); default none, and more is always better.
        reward_start_step: the step at which the reward's term begins (DMDR: after a cold start).
        reward_beside: the metric that is not optimised and that is looked at beside the reward: as --reward; default
            teacher: how little the teacher would change the pictures.
        reward_look_steps: steps between looks at reward, that metric and the pictures' diversity.
        reward_files: folder of the scorers' files; default that of $FEWSTEP_WEIGHTS.
    """

    reward: str | None = None
    reward_weight: float = 0.05
    reward_shares: list[float] | None = None
    reward_margin: list[float] | None = None
    reward_start_step: int = 0
    reward_beside: str = setting("watching", "teacher")
    reward_look_steps: int = setting("watching", 50)
    reward_files: str | None = setting("machine", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_negative("reward_weight", "reward_start_step")
        self._refuse_below_one("reward_look_steps")
        if self.reward is None:
            self._refuse_set("belongs to --reward", *(one.name for one in fields(RewardConfig) if _of_reward(one.name)))
            return
        names = self.rewards
        for flag, given in (("reward", names), ("reward_beside", [self.reward_beside])):
            for name in given:
                if not is_scorer(name) and (flag, name) != ("reward_beside", "teacher"):
                    raise UserError(
                        f"--{flag} takes {', '.join(KNOWN)}, a .safetensors file of one of them or a dotted class, "
                        f"not {name!r}"
                    )
        if len(set(names)) < len(names):
            raise UserError(f"--reward {self.reward} names one twice; give --reward_shares")
        if self.reward_beside in names:
            raise UserError(
                f"--reward_beside {self.reward_beside} is what the student is rewarded by; give a metric that it is not"
            )
        if self.reward_shares is not None and len(self.reward_shares) != len(names):
            raise UserError(f"--reward_shares has {len(self.reward_shares)} for {len(names)} rewards; give one each")
        if self.reward_margin is not None and len(self.reward_margin) not in (1, len(names)):
            raise UserError(f"--reward_margin has {len(self.reward_margin)} for {len(names)} rewards; one or all")

    @property
    def rewards(self) -> list[str]:
        """The rewards by name; none without ``--reward``."""
        return [] if self.reward is None else [part.strip() for part in self.reward.split(",")]


def _of_reward(setting_name: str) -> bool:
    return setting_name.startswith("reward_")


def is_scorer(name: str) -> bool:
    """Whether a name may be one of a scorer: one that is known, a file of one, or a dotted class."""
    return name in KNOWN or name.endswith(".safetensors") or _DOTTED.fullmatch(name) is not None
