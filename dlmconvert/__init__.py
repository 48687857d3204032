"""dlmconvert: autoregressive checkpoints become diffusion language models."""

__version__ = "0.1.0"
