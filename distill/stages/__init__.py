"""The three stages: importance (I), pruning (II), matching (III)."""
