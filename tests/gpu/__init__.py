"""Tests that need an NVIDIA GPU: `-m gpu`."""
