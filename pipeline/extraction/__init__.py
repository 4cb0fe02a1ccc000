"""Extraction: a frozen model over views into a store, in this process or on a cluster of workers.

`extract.extract` is the one way to run a model over views of images. It takes a `FeatureSource`: a `FeatureExtractor`
(model, device, precision, batch size, outputs), a `ViewDataset` (images, view spec, keys, sizes) and `LoaderSettings`.
It yields `FeatureBatch`es; what becomes of them is up to its callers:

    embed.embed                  every export: all pending shards of a store, written to disk
    codebook.train_codebooks     a sample of a store's images, kept in memory, to train codecs
    features.view_features       one view of some rows, kept in memory: validation and augmented probes
    verification.embed_again     a sample of (i, v) of a store: what `compress verify` compares with the stored features

The views of a batch are loaded and embedded by group (`views.groups`), since those of one group have one size.
"""
