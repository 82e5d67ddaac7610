"""Runs whose roles are divided: of every method that can be, and of what changes how they lie."""

from __future__ import annotations

from typing import Any

DMD2: dict[str, Any] = {"method": "dmd2", "critic_updates": 1}
LORA: dict[str, Any] = {"lora_rank": 2}
RCM: dict[str, Any] = {"method": "continuous_consistency", "variant": "rcm", "pairs": "pairs", "critic_updates": 1}
RCM |= {"matching_first_step": 0}
REWARD: dict[str, Any] = {"reward": "toys.Brightness", "reward_look_steps": 1}
HYPER: dict[str, Any] = {"method": "hyper_sd", "critic_updates": 1, "stages": "tscd:1,feedback:1,score", **REWARD}
HYPER |= {"segments": [1], "stage_steps": [], "data": "images"}
#: How a case differs from a run of a flow teacher; ``offload`` and ``group`` are those of the sharding.
CASES: dict[str, dict[str, Any]] = {
    "dmd2": {**DMD2, "ema_decay": 0.5},
    "dmd2_lora": {**DMD2, **LORA, "ema_decay": 0.5},
    "dmd2_full_critic": {**DMD2, **LORA, "full_critic": True},
    "dmd2_gan": {**DMD2, "gan_weight": 0.1, "data": "images"},
    "dmd2_gan_lora": {**DMD2, **LORA, "gan_weight": 0.1, "data": "images"},
    "dmd2_unet": {**DMD2, "teacher": "tiny_stable_diffusion"},
    "dmd2_shared_embedding": {**DMD2, "teacher": "tiny_dit", "classes": "0-3", "prompts": None, "guidance_scale": 2.0},
    "dmd2_tied": {**DMD2, "tie": True},
    "dmd2_accumulation": {**DMD2, "gradient_accumulation_steps": 2},
    "dmd2_checkpointing": {**DMD2, "gradient_checkpointing": True},
    "dmd2_checkpointing_lora": {**DMD2, **LORA, "gradient_checkpointing": True},
    "dmd2_bf16": {**DMD2, "mixed_precision": "bf16"},
    "dmd2_bf16_lora": {**DMD2, **LORA, "mixed_precision": "bf16"},
    "dmd2_offload": {**DMD2, "offload": True},
    "dmd2_groups": {**DMD2, "group": 2},
    "dmd2_groups_lora": {**DMD2, **LORA, "group": 2},
    "sid": {"method": "sid"},
    "sid_lora": {"method": "sid", **LORA},
    "consistency": {"method": "consistency", "target_decay": 0.5},
    "consistency_lora": {"method": "consistency", "target_decay": 0.5, **LORA},
    "phased": {"method": "phased_dmd", "critic_updates": 1, "phase_steps": 2},
    "phased_lora": {"method": "phased_dmd", "critic_updates": 1, "phase_steps": 2, **LORA},
    "mean_flow": {"method": "mean_flow", "data": "images", "apart": 1.0},
    "mean_flow_lora": {"method": "mean_flow", "data": "images", "apart": 1.0, **LORA},
    "rectified_flow": {"method": "rectified_flow", "pairs": "pairs", "ema_decay": 0.5},
    "rectified_flow_lora": {"method": "rectified_flow", "pairs": "pairs", "ema_decay": 0.5, **LORA},
    "ida": {**DMD2, "critic_follows_student": 0.9},
    "ida_lora": {**DMD2, **LORA, "critic_follows_student": 0.9},
    "cdm": {**DMD2, "decoupled": "hybrid", "schedule": "random", "schedule_most": 3, "off_trajectory": 1.0},
    "dp_dmd": {**DMD2, "diversity_weight": 0.05, "diversity_teacher_steps": 6, "renoise": "ode"},
    "dmd2_teacher_head": {**DMD2, "gan_weight": 0.1, "gan_features": "teacher", "data": "images"},
    "snoopi": {"method": "snoopi", "critic_updates": 1},
    "tcd": {"method": "segmented_consistency", "adversarial_weight": [0.1], "offset_noise": 0.1, "data": "images"},
    "tcd_lora": {"method": "segmented_consistency", "adversarial_weight": [0.1], "data": "images", **LORA},
    "pcm": {"method": "segmented_consistency", "variant": "pcm", "adversarial_weight": [0.1], "data": "images"},
    "tscd": {"method": "segmented_consistency", "variant": "tscd", "segments": [2, 1], "stage_steps": [2]},
    "scm": {"method": "continuous_consistency", "pairs": "pairs", "tangent_warmup": 0},
    "scm_lora": {"method": "continuous_consistency", "pairs": "pairs", "tangent_warmup": 0, **LORA},
    "scm_central": {"method": "continuous_consistency", "pairs": "pairs", "derivative": "central"},
    "rcm": {**RCM},
    "rcm_lora": {**RCM, **LORA},
    "tcm": {"method": "continuous_consistency", "variant": "tcm", "data": "images", "boundary_share": 0.5},
    "perflow": {"method": "perflow", "pairs": "pairs", "solver_steps": 2},
    "perflow_lora": {"method": "perflow", "pairs": "pairs", "solver_steps": 2, **LORA},
    "mdt_dist": {"method": "mdt_dist", "pairs": "pairs", "distillation_guidance": 3.0},
    "mdt_dist_lora": {"method": "mdt_dist", "pairs": "pairs", "distillation_guidance": 3.0, **LORA},
    "mdt_dist_exact": {"method": "mdt_dist", "pairs": "pairs", "derivative": "exact"},
    "mf_rae": {"method": "mf_rae", "pairs": "pairs", "apart": 1.0, "walk_steps": 2, "stages": "cmt:2,mfd"},
    "mf_rae_lora": {"method": "mf_rae", "pairs": "pairs", "apart": 1.0, "walk_steps": 2, "stages": "cmt:2,mfd", **LORA},
    "alpha_flow": {"method": "mean_flow", "variant": "alpha_flow", "data": "images", "apart": 1.0},
    "any_flow": {"method": "any_flow", "pairs": "pairs", "equal_share": 0.0, "map_steps": 2, "critic_updates": 1},
    "free_flow": {"method": "free_flow", "steps": 1, "correction": 0.5},
    "free_flow_lora": {"method": "free_flow", "steps": 1, "correction": 0.5, **LORA},
    "hyper_sd": {**HYPER},
    "hyper_sd_lora": {**HYPER, **LORA},
    "flash_dmd": {"method": "flash_dmd", "critic_updates": 1, "data": "images"},
    "flash_dmd_lora": {"method": "flash_dmd", "critic_updates": 1, "data": "images", **LORA},
    "flash_dmd_preferences": {"method": "flash_dmd", "critic_updates": 1, "gan_weight": 0.0, **REWARD}
    | {"reward_start_step": 1, "preference_updates": 1},
    "disback": {"method": "disback", "critic_updates": 1, "degradation_steps": 1, "node_steps": 1},
    "disback_lora": {"method": "disback", "critic_updates": 1, "degradation_steps": 1, "node_steps": 1, **LORA},
    "multi_student": {"method": "multi_student", "critic_updates": 1, "students": 2, "only_student": 1},
}
