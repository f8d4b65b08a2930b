"""Measurements, a module each; what came out is in results/. `python -m benchmarks` lists them."""
