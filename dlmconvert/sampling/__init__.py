"""The reverse process: from a canvas with masked positions to tokens. torch and the standard library only.

Three orthogonal choices in one loop (denoise.py): order (which masked positions first), budget (how many at once), and how a token is
drawn (filters.py, draw.py). `export` copies these very files beside a model, flat, so they import nothing but each other and
`diffusion/randomness.py`; they raise ValueError, which the command line turns into its own error.
"""
