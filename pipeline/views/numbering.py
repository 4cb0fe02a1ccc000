"""View numbers: what their high bits mean, and their names."""

FRESH = 2**31  # view numbers with this bit are never stored: a student's own, `--pairing fresh`
LOCAL = 2**30  # view numbers with this bit are small crops, apart from the global views


def view_name(view: int) -> str:
    """A view's number in words: `view 3`, `local crop 0`."""
    return f"local crop {view & ~(LOCAL | FRESH)}" if view & LOCAL else f"view {view & ~FRESH}"
