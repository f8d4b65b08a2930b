"""Models: ViT, hybrids and convolutional baselines, as pure functions over a dict of parameters.

`build` makes one from a config's `model` block; `spec` has the sizes ("S/16"), `parameters` the
names, `position_embeddings` resampling, `flops` the cost. Guarantees: parameter names and initial
values never change between versions, and an invalid block is refused before anything is allocated.
Nothing here depends on data, devices or training.
"""
