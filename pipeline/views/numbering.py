"""The high bits of view numbers, part of the disk format; `views.groups` says what each group of numbers is."""

FRESH = 2**31  # bit of views that only a student sees and no store keeps, as with `--pairing fresh`
LOCAL = 2**30  # bit of local (small) crops; the numbers of global views lack it
