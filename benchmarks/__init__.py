"""Timings alone, most of them beside what a user would pick instead.

`python benchmarks/recall.py` (or kmeans, train_step) writes
misc/benchmarks/recall.json; `--tiny` takes seconds. `python benchmarks/tables.py` then writes the
tables of docs/scaling.md anew.
"""
