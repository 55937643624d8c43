"""The one place that changes Megatron-Core and that knows its private names, version differences and global parallel state.

Everything else takes process groups as arguments. `patches.PATCHES` lists every change.
"""
