"""Exact nearest neighbours and k-means on features."""
