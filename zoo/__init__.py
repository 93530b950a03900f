"""The zoo: synthetic datasets, objectives and recipes that make the two tiny models, and the tasks that test them.

It imports relook and nothing in relook imports it: what it adds is found by entry point (zoo/pyproject.toml).
"""
