"""Trajectories -> three-valued verdicts -> rewards: rules, maths, what a judge is asked, its cache, the audit.

Never guesses: an unknown verdict is unscored. Calls no vendor; the judge's client is an adapter.
Start with `scoring.py`, then `rules.py`.
"""
