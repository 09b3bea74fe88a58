"""Shards to student: surgery, losses, the loop, evaluation."""
