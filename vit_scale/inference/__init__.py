"""Use a trained model: predict from images, or export the weights for other libraries."""
