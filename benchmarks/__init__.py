"""Measurements, one module each; results are in results/benchmarks/.

`python -m benchmarks` lists them.
"""
