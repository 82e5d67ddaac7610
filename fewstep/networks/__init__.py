"""A stock network as student, teacher or critic: its x0, guided, tapped, differentiated, and shared by adapters."""
