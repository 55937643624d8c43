"""Recipes of the Qwen family."""
