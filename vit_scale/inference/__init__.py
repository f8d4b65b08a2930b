"""Use a trained model: predict class probabilities, or export it to other libraries.

`predictor.load` returns a model that takes uint8 images and preprocesses them exactly as its
evaluation does. `export.export` writes weights that timm, transformers or Google's code load, or a
serialized JAX function; the exported model computes the same logits, or a note says why not.
"""
