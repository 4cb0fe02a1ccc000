"""Small networks written here, and teachers whose trained weights are in this folder or in an optional package."""
