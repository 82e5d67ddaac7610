"""Losses as functions of tensors, each with the equation that it implements; they know no network."""
