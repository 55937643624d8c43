"""A run as one page to look at, and live in a terminal. Reads metrics.jsonl only: no torch, no Megatron-Core."""
