"""Clips and captions that runs learn from."""
