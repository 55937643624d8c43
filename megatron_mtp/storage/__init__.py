"""Storage of checkpoints and data: files on mounted file systems, and objects behind addresses such as s3://bucket/run.

`address` holds what an address is, as text alone; `place` gives files and objects one form; `connection` talks to the
servers. Nothing here imports torch, and fsspec is imported when an address is first used.
"""
