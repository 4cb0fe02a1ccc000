"""View groups: the kinds of views that an image has, such as global views and local crops.

A group says which numbers its views have, how they are drawn and rendered, and what their arrays are called. Whoever
needs to know that of a view number or of the name of an array asks its group. A further kind of view, say crops of
another size, is one more entry of GROUPS: nothing else names the members of that list in order to tell them apart.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.views.policies import LOCAL_POLICIES, POLICIES, Augmentation, Policies

# High bits of view numbers, part of the disk format.
FRESH = 2**31  # of views that only a student sees and no store keeps, as with `--pairing fresh`
LOCAL = 2**30  # of local (small) crops; the numbers of global views lack it

T = TypeVar("T")

PerGroup = Mapping[str, T]
"""One thing for each of several groups, by the name of the group. A fresh group has the name of the stored one."""

ROOM = 2**28
"""View numbers that each group has for itself."""


@dataclass(frozen=True)
class ViewGroup:
    """Views that are numbered, drawn, rendered and stored alike. Names and numbers are part of the disk format.

    In GROUPS `count` and `size` are 0; the groups of one store or of one run state how many views there are, and
    how large.
    """

    name: str  # of the group in requests, in batches and in a store's identity
    noun: str  # what one of its views is called in messages
    first: int  # number of its first view
    prefix: str  # of the names of its arrays, of a student's outputs, and of what a method finds in its batch
    policies: Policies = field(compare=False, repr=False)
    plain: bool = False  # whether its first view is the plain one; the other views are random
    ratio: tuple[int, int] | None = None  # side of its views to side of global views; None: the same side
    outputs: tuple[str, ...] | None = None  # outputs of the teacher that a store keeps of such views; None: all
    flags: str = ""  # what makes export-teacher store such views
    count: int = 0  # views per image, the absent ones below `start` included
    start: int = 0  # the first ones, which a store that was cut down does not hold
    size: int = 0  # side of the stored views in pixels

    # ---------------------------------------------------------------- numbers

    @property
    def stored(self) -> bool:
        """Whether stores keep such views. The others are fresh: a student sees them once, without a stored feature."""
        return not self.first & FRESH

    @property
    def numbers(self) -> range:
        """Numbers of the views that there are."""
        return range(self.first + self.start, self.first + self.count)

    def contains(self, view: int) -> bool:
        """Whether a view number is one of this group's, however many views there are."""
        return self.first <= view < self.first + ROOM

    def column(self, view: int) -> int:
        """Index of a view along the view axis of the group's arrays."""
        return view - self.first

    def numbers_in(self, epochs: np.ndarray) -> np.ndarray:
        """(..., count) int64 numbers of the views that are shown in these epochs (...).

        Of a stored group these are the same ones in every epoch, of a fresh group others in each.
        """
        numbers = np.arange(self.first + self.start, self.first + self.count)
        shift = 0 if self.stored else self.count
        shown: np.ndarray = numbers + epochs[..., None] * shift
        return shown

    def fresh(self, count: int = 0) -> "ViewGroup":
        """The group of `count` views that are drawn alike, but for a student alone: no store keeps them."""
        return replace(self, first=self.first | FRESH, plain=False, count=count, start=0)

    # ---------------------------------------------------------------- names

    def array(self, output: str) -> str:
        """Name of the array, or of the student's output, that holds an output of a model for this group's views."""
        return self.prefix + output

    def arrays(self, outputs: Iterable[str]) -> dict[str, str]:
        """{array: output that it holds} of those outputs of a model that are kept of this group's views."""
        kept = [name for name in outputs if self.outputs is None or name in self.outputs]
        return {self.array(name): name for name in kept}

    def output(self, array: str) -> str:
        """Name of the model's output that an array of this group holds."""
        return array.removeprefix(self.prefix)

    # ---------------------------------------------------------------- pixels

    def augmentation(self, policy: str, view: int) -> Augmentation | None:
        """The distribution that a view is drawn from; None for the plain view."""
        choices = self.policies.get(policy, ())
        if not choices or (self.plain and view == self.first):
            return None
        return choices[(view - self.first - 1) % len(choices)]

    def side(self, size: int) -> int:
        """Side in pixels of this group's views beside global views of `size` pixels.

        A smaller side is rounded to a multiple of eight pixels.
        """
        if self.ratio is None:
            return size
        part, whole = self.ratio
        return max(8, 8 * round(size * part / whole / 8))


GLOBAL_VIEWS = ViewGroup("global", "view", 0, "", POLICIES, plain=True)
"""Views of whole images or of large parts. View 0 is the plain one, which evaluation uses."""

LOCAL_CROPS = ViewGroup(
    "local", "local crop", LOCAL, "local_", LOCAL_POLICIES, ratio=(3, 7), outputs=("embedding", "projection"),
    flags="--local-views 6",
)  # fmt: skip
"""Small crops. The ratio of their side is that of DINO, 96 to 224 pixels."""

GROUPS: tuple[ViewGroup, ...] = (GLOBAL_VIEWS, LOCAL_CROPS, GLOBAL_VIEWS.fresh(), LOCAL_CROPS.fresh())
"""All groups that there are, global views first."""


def group_of(view: int, groups: Iterable[ViewGroup] | None = None) -> ViewGroup:
    """The group among `groups`, by default among GROUPS, that a view number belongs to. Raises UserError if none."""
    for group in GROUPS if groups is None else groups:
        if group.contains(view):
            return group
    raise UserError(f"{view} is the number of no view; find the damage with compress verify")


def group_of_array(array: str, groups: Iterable[ViewGroup] | None = None) -> ViewGroup:
    """The stored group among `groups`, by default among GROUPS, whose prefix the name of an array has."""
    found = [group for group in groups or GROUPS if group.stored and array.startswith(group.prefix)]
    return max(found, key=lambda group: len(group.prefix))


def named_group(name: str) -> ViewGroup:
    """The stored group of this name."""
    return next(group for group in GROUPS if group.stored and group.name == name)


def by_group(views: Iterable[int]) -> dict[str, list[int]]:
    """View numbers by the names of their groups, in the order in which they are given."""
    found: dict[str, list[int]] = {}
    for view in views:
        found.setdefault(group_of(view).name, []).append(view)
    return found


def view_name(view: int) -> str:
    """Name of a view in messages: `view 3`, `local crop 0`."""
    group = group_of(view)
    return f"{group.noun} {group.column(view)}"
