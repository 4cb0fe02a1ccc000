"""features[i, v] on disk: layout, shards, codecs, integrity, copies."""
