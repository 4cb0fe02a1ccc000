"""Processes that train together: collectives and starting them."""
