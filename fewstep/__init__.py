"""Few-step distillation of diffusion and flow-matching pipelines."""

from pathlib import Path

# In a checkout, trainers/, pipelines/ and eval/ stand beside this package; in a wheel they are inside it.
if not (Path(__file__).parent / "trainers").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"
