"""Small networks of our own, for small images. Named in compress_ssl.pipeline.models."""
