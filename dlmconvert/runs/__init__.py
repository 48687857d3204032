"""A run folder, its stages, and what they leave behind."""
