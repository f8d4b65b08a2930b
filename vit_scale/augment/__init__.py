"""Augmentation: draws keyed by the step, and what the train step does to a batch of images.

Every draw is a pure function of (seed, step, position in the global batch), so a batch is the same
on any number of hosts. `view` is the deterministic crop that evaluation uses.
"""
