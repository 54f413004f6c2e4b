"""Greedy rollouts on held-out rows and what they say: accuracy, tool use, by family and by need.

Trains nothing and needs no policy; a benchmark is one file.
Start with `evaluate.py`.
"""
