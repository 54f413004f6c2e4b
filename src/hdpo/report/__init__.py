"""A run's folder -> one page to look at: charts, tables, rollouts. No network, no script from elsewhere.

Reads files that a run has written, and nothing else of it.
Start with `page.py`.
"""
