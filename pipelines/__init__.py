"""Pipelines for students that no stock diffusers class can express. So far every student is stock."""
