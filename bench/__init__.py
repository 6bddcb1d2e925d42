"""Benchmarks: `run.py` for whole models, `ops/` with one file an op, `baselines/` to measure against, `results/`."""
