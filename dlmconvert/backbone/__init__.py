"""A Hugging Face AR model becomes a denoiser."""
