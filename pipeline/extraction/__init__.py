"""A frozen model over views, into a store: here or on a cluster of workers."""
