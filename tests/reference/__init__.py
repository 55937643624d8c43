"""The judge of every parity test: a plain PyTorch model of what the project trains.

Nothing here imports megatron or megatron_mtp.
"""
