"""View v of an image as a function of (seed, key of the image, v): drawing, resolving, rendering, loading."""
