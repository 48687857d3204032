"""The reverse process: from a canvas with masked positions to tokens. torch and the standard library only.

Orthogonal choices in one loop (loop.py): order (which masked positions first), budget (how many at once), cache (what is recomputed),
and how a token is drawn (filters.py, draw.py). `denoise` checks the settings and picks the loop; speculation, revision and growing
answers have loops of their own. `export` copies these very files beside a model, flat, so they import nothing but each other and
`diffusion/`; they raise ValueError, which the command line turns into its own error.
"""
