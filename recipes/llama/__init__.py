"""Recipes of the Llama family and of models with its architecture."""
