"""The mathematics. torch only: no Hugging Face, no files, no global randomness."""
