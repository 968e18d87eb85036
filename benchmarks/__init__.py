"""Timings alone: of this project, most beside what a user would pick instead, in turn.

`python benchmarks/recall.py` (or kmeans, train_step) writes
misc/benchmarks/recall.json; `--tiny` takes seconds. `python benchmarks/tables.py` then writes the
tables of docs/scaling.md anew.
"""
