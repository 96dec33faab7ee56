"""Tiny pipeline folders of the real classes, with random weights."""
