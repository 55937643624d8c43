"""Recipes of the GLM family."""
