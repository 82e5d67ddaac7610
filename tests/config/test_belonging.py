"""Settings that would change nothing, since another one is what makes them matter, are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from fewstep.config.pairs import PairsConfig
from fewstep.errors import UserError
from fewstep.programs.methods import method_class

REWARD = {"reward": "clip", "steps": 2}
#: Method, what makes the settings matter, what does not, and the settings. What follows from no other stands in both.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("dmd2", {"eval_steps": 5}, {}, {"eval_samples": 8}),
    ("dmd2", {"stop_on": "collapse"}, {"stop_on": "never"}, {"rollbacks": 1}),
    ("dmd2", {"prompts": "p.txt"}, {}, {"data_text": "caption"}),
    ("dmd2", {"reward": "clip"}, {}, {"reward_weight": 0.1, "reward_start_step": 3, "reward_look_steps": 9}),
    ("dmd2", {"reward": "clip"}, {}, {"reward_beside": "aesthetic", "reward_shares": [1.0], "reward_margin": [0.1]}),
    (
        "dmd2",
        {"diversity_weight": 0.1, "renoise": "ode"},
        {},
        {"diversity_teacher_steps": 9, "diversity_anchor_steps": 3},
    ),
    ("dmd2", {"schedule": "random"}, {}, {"schedule_fewest": 2, "schedule_most": 9}),
    ("dmd2", {"schedule": "random"}, {}, {"schedule_low": 0.3, "schedule_high": 0.9}),
    ("dmd2", {"off_trajectory": 1.0}, {}, {"off_trajectory_input": "point", "off_trajectory_teacher_time": "student"}),
    ("flash_dmd", {**REWARD, "data": "d"}, {"data": "d"}, {"preference_updates": 3, "preference_beta": 9.0}),
    ("flash_dmd", {**REWARD, "data": "d"}, {"data": "d"}, {"preference_candidates": 3}),
    ("flash_dmd", {"data": "d"}, {"gan_weight": 0.0}, {"gan_loss": "hinge"}),
    ("mdt_dist", {}, {"distillation_weight": 0.0}, {"distillation_guidance": 3.0, "distillation_time_weight": "1-t"}),
    ("mdt_dist", {}, {"times": "uniform"}, {"time_mean": 0.5, "time_std": 0.5}),
    ("consistency", {"variant": "ict", "data": "d"}, {}, {"first_levels": 5, "last_levels": 50}),
    ("consistency", {"variant": "ict", "data": "d"}, {}, {"level_mean": 1.0, "level_std": 1.0}),
    (
        "consistency",
        {"variant": "ect", "data": "d"},
        {},
        {"ect_q": 4.0, "ect_stage_steps": 9, "ect_k": 4.0, "ect_b": 2.0},
    ),
    ("continuous_consistency", {"derivative": "central"}, {}, {"derivative_step": 1e-3}),
    ("continuous_consistency", {}, {"variant": "tcm", "data": "d", "init": "i"}, {"tangent_constant": 0.2}),
    (
        "continuous_consistency",
        {"variant": "tcm", "data": "d", "init": "i"},
        {},
        {"transition": 2.0, "gap": 0.01, "mapping_k": 4.0, "mapping_b": 2.0, "boundary_share": 0.1, "huber_c": 0.1},
    ),
    ("mean_flow", {"derivative": "central"}, {}, {"derivative_step": 1e-3}),
    ("mean_flow", {}, {"times": "uniform"}, {"time_mean": 0.5, "time_std": 0.5}),
    ("mean_flow", {"times": "uniform"}, {}, {"time_max": 0.9}),
    ("mean_flow", {"r_mean": -1.0}, {}, {"r_std": 0.5}),
    ("mean_flow", {"variant": "alpha_flow"}, {}, {"alpha_first_step": 5, "alpha_last_step": 50, "alpha_min": 0.1}),
    ("mean_flow", {"variant": "alpha_flow"}, {}, {"alpha_clamp": 4.0}),
    ("mean_flow", {"data": "d"}, {}, {"guidance_t_min": 0.1, "guidance_t_max": 0.9, "label_drop": 0.2}),
    ("mf_rae", {}, {"stages": "mfd"}, {"walk_solver": "heun", "label_times": "uniform_grid", "cmt_distance": "l1"}),
    ("any_flow", {"derivative": "central"}, {}, {"derivative_step": 1e-3}),
    ("any_flow", {}, {"critic_times": "uniform"}, {"critic_time_mean": 0.5, "critic_time_std": 0.5}),
    ("perflow", {"guidance": "kept"}, {}, {"label_drop": 0.2}),
    ("perflow", {"distance": "pseudo_huber_norm"}, {}, {"huber_c": 0.1}),
    ("segmented_consistency", {}, {"variant": "tscd"}, {"huber_c": 0.1}),
    ("segmented_consistency", {}, {"renoise": "ode"}, {"gamma": 0.5}),
    ("segmented_consistency", {"adversarial_weight": [0.1]}, {}, {"adversarial_lr": 1e-4}),
    ("speed_up_net", {}, {"consistency_weight": 0.0}, {"solver": "heun", "solver_steps": 3}),
    ("twin_flow", {}, {"distance": "pseudo_huber_norm"}, {"distance_alpha": 2.0}),
    ("twin_flow", {}, {"distance": "mse"}, {"distance_alpha": 2.0, "distance_c": 0.1}),
    ("twin_flow", {}, {"parts": ["any", "adv"]}, {"mul_fraction": 0.1}),
    ("twin_flow", {}, {"parts": ["any"]}, {"adversarial_weight": 0.5}),
    ("free_flow", {}, {"correction": 0.0}, {"correction_scale": 2.0, "correction_t_max": 0.5}),
    ("free_flow", {}, {"correction": 0.0}, {"match_min": 0.1, "match_max": 0.9}),
    ("free_flow", {}, {"derivative": "exact"}, {"derivative_step": 1e-2}),
    ("rectified_flow", {}, {"times": "uniform"}, {"u_steepness": 2.0}),
    ("rectified_flow", {}, {"loss": "l2"}, {"huber_factor": 0.1, "huber_scaling": "released"}),
    ("rectified_flow", {"data": "d"}, {}, {"inverted_share": 0.2}),
    ("hyper_sd", {**REWARD, "stages": "tscd:900,feedback"}, {"stages": "tscd:900,score"}, {"feedback_lr": 1e-6}),
    ("hyper_sd", {}, {**REWARD, "stages": "tscd:900,feedback"}, {"score_lr": 1e-6, "score_weight": 0.1}),
]


@pytest.mark.parametrize(("method", "mattering", "idle", "settings"), CASES)
def test_what_would_change_nothing_is_refused(
    method: str, mattering: dict[str, Any], idle: dict[str, Any], settings: dict[str, Any]
) -> None:
    config = method_class(method).Config
    assert config(teacher="t", out="o", **idle) and config(teacher="t", out="o", **mattering, **settings)
    for name, value in settings.items():
        with pytest.raises(UserError, match=rf"leave out --{name}\b") as refused:
            config(teacher="t", out="o", **idle, **{name: value})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("dmd2", name) for name in ("guidance_scale", "image_guidance_scale")),
        ("mdt_dist", "distillation_guidance"),
        ("disback", "node_guidance_scale"),
        ("consistency", "guidance_min"),
    ],
)
def test_a_teacher_is_not_guided_away_from_its_condition(method: str, name: str) -> None:
    with pytest.raises(UserError, match=rf"^--{name} must not be negative, and it is -1"):
        method_class(method).Config(teacher="t", out="o", **{name: -1.0})


def test_pairs_are_refused_the_same() -> None:
    with pytest.raises(UserError, match="leave out --data_text"):
        PairsConfig(teacher="t", out="o", num=2, data_text="caption")
    with pytest.raises(UserError, match="--guidance_scale must not be negative"):
        PairsConfig(teacher="t", out="o", num=2, guidance_scale=-2.0)
