"""x_t = alpha x0 + sigma noise: schedules, predictions, times, keyed draws, rollout and ODE, which know no network."""
