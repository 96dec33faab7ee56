"""Owns the model: takes jobs from the queue, makes the videos."""
