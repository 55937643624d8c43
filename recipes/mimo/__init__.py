"""Recipes of the MiMo family."""
