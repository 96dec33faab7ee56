"""Make students: teach a small teacher, and (next) prune and distil it."""
