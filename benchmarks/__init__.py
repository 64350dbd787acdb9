"""Measurements, beside other libraries' and the papers' pipelines in turn; `scripts/benchmark.py` runs them."""
