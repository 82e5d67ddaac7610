"""Short runs of every method and of its larger options, for what holds of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

RUN = {"classes": "0-2", "steps": 2, "max_steps": 4, "log_steps": 1, "lr": 1e-4, "sample_steps": 0, "cpu": True}
RUN |= {"report_to": "none", "guidance_scale": 5.0}
CRITIC = {"critic_updates": 1}
PAIRS = {"num_pairs": 16, "pair_steps": 2}
REWARD = {"reward": "toys.Brightness", "reward_look_steps": 1}
LORA = {"lora_rank": 2, "merge": True}
#: Name -> method and settings; ``data`` stands for images, ``init`` for a run of DMD2, ``teacher`` for another one than
#: of labels.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dmd2": ("dmd2", {**CRITIC, "gan_weight": 1e-2, "data": "", "ema_decay": 0.5}),
    "dmd2, decoupled": ("dmd2", {**CRITIC, "decoupled": "hybrid"}),
    "ida": ("dmd2", {**CRITIC, "critic_follows_student": 0.9}),
    "dp-dmd": ("dmd2", {**CRITIC, "diversity_weight": 0.05, "diversity_teacher_steps": 6, "renoise": "ode"}),
    "cdm": (
        "dmd2",
        {**CRITIC, "decoupled": "hybrid", "schedule": "random", "schedule_most": 3, "off_trajectory": 1.0},
    ),
    "f-distill": ("dmd2", {**CRITIC, "f_divergence": "js", "f_bins": 4, "f_momentum": 0.5, "data": ""}),
    "phased": ("phased_dmd", {**CRITIC, "steps": 2, "phases": [1, 1], "phase_steps": 2}),
    # At first the critic is the teacher: only another guidance tells them apart.
    "sid": ("sid", {**CRITIC, "critic_guidance": 1.0}),
    "sida": (
        "sid",
        {
            **CRITIC,
            "critic_guidance": 1.0,
            "adversarial": "sida",
            "gan_weight": 1.0,
            "gan_critic_weight": 1.0,
            "data": "",
        },
    ),
    "consistency": ("consistency", {}),
    "scm": ("continuous_consistency", {**PAIRS, "tangent_warmup": 0}),
    "rcm": ("continuous_consistency", {**PAIRS, **CRITIC, "variant": "rcm", "matching_first_step": 0}),
    "mean flow": ("mean_flow", {**PAIRS, "apart": 0.75}),
    "mdt_dist": ("mdt_dist", {**PAIRS, "distillation_guidance": 3.0}),
    "perflow": ("perflow", {**PAIRS, "solver_steps": 2}),
    "mf_rae": ("mf_rae", {**PAIRS, "apart": 0.75, "walk_steps": 2, "pairs_per_walk": 1, "stages": "cmt:2,mfd"}),
    "any_flow": ("any_flow", {**PAIRS, **CRITIC, "map_steps": 2}),
    "free_flow": ("free_flow", {"steps": 1, "correction": 0.0}),  # corrected samples are those of a micro-batch
    "twin_flow": ("twin_flow", PAIRS),
    "rectified flow": ("rectified_flow", {**PAIRS, "steps": 1}),
    "segmented consistency": ("segmented_consistency", {"adversarial_weight": [0.1], "offset_noise": 0.1, "data": ""}),
    "pcm": ("segmented_consistency", {"variant": "pcm", "adversarial_weight": [0.1], "data": ""}),
    "pcm, own samples": ("segmented_consistency", {"variant": "pcm"}),
    # Whose critic, guided as its teacher is, would say the same as that at first: both go on from another run.
    "snoopi": ("snoopi", {**CRITIC, "guidance_scale": None, "init": ""}),
    "tscd": ("segmented_consistency", {"variant": "tscd", "segments": [2, 1], "stage_steps": [2], "data": ""}),
    "hyper_sd": (
        "hyper_sd",
        {**CRITIC, **REWARD, "stages": "tscd:1,feedback:1,score", "segments": [1], "stage_steps": [], "data": ""},
    ),
    "flash_dmd": ("flash_dmd", {**CRITIC, "data": "", "ema_decay": 0.5}),
    "flash_dmd, preferences": (
        "flash_dmd",
        {**CRITIC, **REWARD, "reward_start_step": 1, "preference_updates": 1, "gan_weight": 0.0},
    ),
    "disback": ("disback", {**CRITIC, "degradation_steps": 1, "node_steps": 1}),
    "multi_student": ("multi_student", {**CRITIC, "students": 3, "only_student": 2}),
    "multi_student, smaller": (
        "multi_student",
        {**CRITIC, "students": 3, "only_student": 2, "student_network": {"num_layers": 1}, "pretraining_steps": 2}
        | {"data": ""},
    ),
    "mft": ("mf_rae", {**PAIRS, "apart": 0.75, "stages": "mfd:2,mft", "data": "", "label_drop": 0.5}),
    "any_flow, data": ("any_flow", {**CRITIC, "map_steps": 2, "velocity": "data", "rebalance": False, "data": ""}),
    "speed_up_net": ("speed_up_net", {**PAIRS, "solver_steps": 2, "teacher": "text"}),
    "dmd2, items": ("dmd2", {**CRITIC, "teacher": "items"}),
    "rectified flow, items": ("rectified_flow", {**PAIRS, "steps": 1, "teacher": "items"}),
}


def images(folder: Path) -> str:
    for label in range(3):
        (folder / str(label)).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (16, 16), (40 * number, 80 * label, 90)).save(folder / str(label) / f"{number}.png")
    return str(folder)
