"""Recipes of the Mistral family."""
