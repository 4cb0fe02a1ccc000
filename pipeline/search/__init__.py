"""Exact nearest neighbours and k-means on feature arrays, both by FAISS: `exact.search` and `kmeans.kmeans`."""
