"""Synthetic datasets, training objectives and recipes of the two tiny models, and the tasks that evaluate them.

The zoo imports relook, never the reverse; relook finds it by entry points (zoo/pyproject.toml).
"""
