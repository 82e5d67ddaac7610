"""Schedules, predictions, times, keyed random draws, rollouts and ODE solvers of x_t = alpha x0 + sigma noise."""
