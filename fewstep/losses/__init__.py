"""Losses as pure functions of tensors: no networks, no schedules, no state."""
