"""Under which settings the calls of each method are counted."""

from __future__ import annotations

#: What a method must be told to run at all, and further settings under which it costs something else.
SETTINGS: dict[str, dict] = {
    "continuous_consistency": {"num_pairs": 6, "pair_steps": 2},
    "disback": {"critic_updates": 2, "degradation_steps": 2, "record_steps": [1, 2], "node_steps": 2},
    "dmd2": {"critic_updates": 2},
    "mdt_dist": {"num_pairs": 6, "pair_steps": 2},
    "flash_dmd": {"data": True},
    "hyper_sd": {"segments": [2, 1], "stage_steps": [1]},
    "mean_flow": {"num_pairs": 6, "pair_steps": 2, "apart": 0.5},
    "perflow": {"num_pairs": 6, "pair_steps": 2, "solver_steps": 2},
    "any_flow": {"num_pairs": 6, "pair_steps": 2, "map_steps": 2, "critic_updates": 2},
    "free_flow": {"steps": 1},
    "mf_rae": {"num_pairs": 6, "pair_steps": 2, "apart": 0.5, "walk_steps": 3, "stages": "cmt:2,mfd"},
    "phased_dmd": {"critic_updates": 2, "phase_steps": 3},
    "rectified_flow": {"num_pairs": 6, "pair_steps": 2},
    "sid": {"critic_updates": 2},
    "snoopi": {"critic_updates": 2},
    "speed_up_net": {"num_pairs": 6, "pair_steps": 2, "solver_steps": 2},
    "twin_flow": {"num_pairs": 6, "pair_steps": 2},
}
VARIANTS: dict[str, dict[str, dict]] = {
    "consistency": {"heun": {"variant": "cd"}, "images": {"variant": "ict", "data": True}},
    "continuous_consistency": {
        "images": {"data": True, "velocity": "data"},
        "rcm": {"variant": "rcm", "matching_first_step": 2, "critic_updates": 1, "derivative": "discrete"},
        "tcm": {"variant": "tcm", "data": True, "init": "first", "transition": 0.3, "boundary_share": 0.5},
        "semi_continuous": {"derivative": "semi_continuous", "data": True},
    },
    "dmd2": {
        "gan": {"gan_weight": 0.1, "data": True},
        "gan_of_teacher": {"gan_weight": 0.1, "gan_features": "teacher", "data": True},
        "decoupled": {"decoupled": "hybrid"},
        "f-distill": {"f_divergence": "js", "data": True},
        "swiftbrush": {"swiftbrush": True},
    },
    "flash_dmd": {"matched alone": {"gan_weight": 0.0, "data": None, "critic_follows_student": 1.0}},
    "mean_flow": {
        "images": {"data": True, "guidance_scale": 3.0, "kappa": 0.5},
        "alpha": {"variant": "alpha_flow"},
        "improved": {"variant": "improved", "data": True},
        "central": {"derivative": "central"},
        "backward": {"derivative": "backward"},
    },
    "mdt_dist": {
        "exact": {"derivative": "exact", "data": True, "distillation_guidance": 3.0},
        "matching": {"distillation_weight": 0.0, "derivative": "central"},
    },
    "perflow": {"heun": {"solver": "heun", "guidance": "kept"}},
    "free_flow": {"prediction": {"correction": 0.0, "derivative": "exact"}},
    "mf_rae": {
        "bootstrapped": {"data": True, "stages": "cmt:1,mfd:2,mft", "pairs_per_walk": 1, "derivative": "exact"},
        "heun": {"walk_solver": "heun", "stages": "cmt", "pairs_per_walk": 2},
    },
    "multi_student": {"two": {"students": 2}, "smaller": {"student_network": {"layers_per_block": 2}, "data": True}},
    "phased_dmd": {"alternating": {"order": "alternating", "phase_steps": None}},
    "speed_up_net": {"drawn": {"data": True, "guidance_min": 2.0, "guidance_max": 4.0, "solver": "heun"}},
    "segmented_consistency": {
        "stages": {"variant": "tscd", "segments": [2, 1], "stage_steps": [2], "data": True},
        "phases": {"variant": "pcm", "adversarial_weight": [0.1], "data": True},
    },
    "twin_flow": {
        "images": {"data": True, "guidance_scale": 3.0, "target_decay": 0.5},
        "image_free": {"image_free": True, "order": 1, "parts": ["e2e", "one", "adv"]},
    },
    "sid": {"zero_gan": {"guidance": "zero", "adversarial": "diffusion_gan", "gan_start_step": 2, "data": True}},
}
