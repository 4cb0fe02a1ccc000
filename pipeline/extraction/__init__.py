"""Extraction: a frozen model over views into a store, in this process or on a cluster of workers.

Ways to run a model over views of images, and what each is for:

    embed.embed                  every export: all pending shards of a store, written to disk
    codebook.train_codebooks     `embed` on a sample into a temporary store, to train codecs
    features.view_features       one view of some rows, kept in memory: validation and augmented probes
    verification.embed_again     a sample of (i, v) of a store: what `compress verify` compares with the stored features
    FeatureExtractor             one batch of pixels: what all but `view_features` call
"""
