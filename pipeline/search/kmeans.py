"""k-means by FAISS."""

import numpy as np

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.search.exact import build_index, search


def kmeans(features: np.ndarray, k: int, iterations: int = 20, seed: int = 1234) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's k-means: (centroids (k, D) float32, assignment (N,) int64 of every row).

    FAISS's Clustering as CompRess (Koohpayegani et al. 2020) runs it: k random rows to begin with,
    one run, no subsampling, an emptied cluster splits a large one, centroids not normalised. The
    assignment is to the final centroids. Raises UserError if there are fewer rows than clusters.
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
    clustering.max_points_per_centroid = 10_000_000  # FAISS would take 256 per cluster at random
    clustering.min_points_per_centroid = 1  # below it FAISS only prints a warning
    clustering.train(features, build_index(features.shape[1], "l2", float16=False))
    centroids = faiss.vector_float_to_array(clustering.centroids).reshape(k, features.shape[1]).copy()
    return centroids, assign(features, centroids)


def assign(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(N,) int64: the nearest centroid of each row by L2, the lower number when two are equally near."""
    return search(features, centroids, 1, "l2")[1][:, 0]
