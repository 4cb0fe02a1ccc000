"""View numbers: the meaning of their high bits, and their names in messages."""

FRESH = 2**31  # bit of views that only a student sees and no store keeps, as with `--pairing fresh`
LOCAL = 2**30  # bit of local (small) crops; the numbers of global views lack it


def view_name(view: int) -> str:
    """Name of a view in messages: `view 3`, `local crop 0`."""
    return f"local crop {view & ~(LOCAL | FRESH)}" if view & LOCAL else f"view {view & ~FRESH}"
