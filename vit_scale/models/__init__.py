"""Models as mathematics: ViT, its parts, convolutional baselines, sizes, parameters, and FLOPs.

Nothing here knows about data, devices, or training.
"""
