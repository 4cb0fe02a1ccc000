"""The feature store: the array features[i, v] on disk, with its layout, codecs, integrity checks and copies.

Open one with `feature_store.FeatureStore`. The format is described in docs/store.md.
"""
