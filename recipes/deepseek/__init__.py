"""Recipes of the DeepSeek family."""
