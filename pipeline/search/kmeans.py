"""k-means by FAISS, and the assignment of features to given centroids."""

import numpy as np

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.search.exact import build_index, search

MAX_POINTS_PER_CENTROID = 10_000_000  # images: more than any cluster has. FAISS's default draws 256 per cluster


def kmeans(features: np.ndarray, k: int, iterations: int = 20, seed: int = 1234) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's k-means on (N, D) features: (centroids (k, D) float32, assignment (N,) int64 of each row).

    The settings are those of CompRess (Koohpayegani et al. 2020, arXiv 2010.14713): k random rows as first
    centroids, one run, no subsampling of rows, an empty cluster takes half of a large one, and centroids are not
    normalised. The assignment is to the final centroids. Raises UserError if there are fewer rows than clusters.
    """
    import faiss

    if not 1 <= k <= len(features):
        raise UserError(
            f"{k} clusters were asked for of {len(features)} images; there must be at least one image per cluster: "
            "give more images or fewer clusters"
        )
    features = np.ascontiguousarray(features, dtype=np.float32)
    clustering = faiss.Clustering(features.shape[1], k)
    clustering.niter = iterations
    clustering.seed = seed
    clustering.max_points_per_centroid = MAX_POINTS_PER_CENTROID
    clustering.min_points_per_centroid = 1  # with fewer images per cluster FAISS only prints a warning
    clustering.train(features, build_index(features.shape[1], "l2", float16=False))
    centroids = faiss.vector_float_to_array(clustering.centroids).reshape(k, features.shape[1]).copy()
    return centroids, assign(features, centroids)


def assign(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(N,) int64: the number of the centroid (k, D) nearest to each row by L2; of equally near ones the lowest."""
    return search(features, centroids, 1, "l2")[1][:, 0]
