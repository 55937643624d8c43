"""The one place that knows Megatron-Core's private names, version differences and global parallel state.

Everything else takes process groups as arguments. `patches.PATCHES` lists every change to Megatron-Core and torch.
"""
