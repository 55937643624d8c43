"""Recipes of Moonshot AI's models."""
