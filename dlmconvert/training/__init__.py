"""The loop, the engines behind it, and checkpoints that survive."""
