"""Decoding with the MTP layers as the drafter."""
