"""Small networks of our own, for small images. Named in pipeline.models."""
