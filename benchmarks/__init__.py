"""Measurements that anyone can repeat; the reports beside them name their commands."""
