"""Metrics with units, where they are written, and early warnings. Imports torch nowhere and megatron never."""
