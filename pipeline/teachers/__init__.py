"""Ready teachers: networks whose trained weights come as a package. Named in compress_ssl.pipeline.models."""
