"""What is fast and by how much: each script runs this project beside what a user would pick instead, in one run.

`python benchmarks/recall.py` (or kmeans.py, growth.py) from the repository's root; --tiny takes seconds.
"""
