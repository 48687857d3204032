"""Measurements of a model: likelihood first."""
