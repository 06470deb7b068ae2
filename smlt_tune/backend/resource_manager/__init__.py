"""Chooses allocations (paper 1b)."""
