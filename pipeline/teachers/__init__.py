"""Ready teachers: networks whose trained weights come as a package. Named in pipeline.models."""
