"""Speculative decoding with the MTP layers as drafters."""
