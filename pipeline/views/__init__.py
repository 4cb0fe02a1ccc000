"""View v of an image as a pure function of (seed, view key of the image, v).

A view is drawn (`augment.draw_variates`), resolved for the size of the image (`augment.resolve_view`), rendered
(`render.render_views`) and loaded by worker processes (`loader.iterate_views`).
"""
