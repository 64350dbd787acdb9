"""Measurements beside restated pipelines of the papers, interleaved in one run; `scripts/benchmark.py` runs them."""
