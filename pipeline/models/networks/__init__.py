"""Small networks of our own, and ready teachers whose trained weights come as a package."""
