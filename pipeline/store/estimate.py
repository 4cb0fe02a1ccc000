"""Estimate an export for --dry-run: forward passes, bytes, files, and the free space on the disk."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from compress_ssl.pipeline.runtime.formatting import format_bytes
from compress_ssl.pipeline.runtime.storage import is_url, local_path
from compress_ssl.pipeline.store.codecs import Codec, build_codec
from compress_ssl.pipeline.store.layout import VIEW_BLOCK
from compress_ssl.pipeline.store.records import StoreIdentity
from compress_ssl.pipeline.store.shards import Shard
from compress_ssl.pipeline.views.groups import by_group, group_of_array


def estimate(identity: StoreIdentity, views: int, out: str, pending: Sequence[Shard] | None) -> dict[str, object]:
    """{"summary", "forwards", "bytes", ...} of an export.

    identity: that of the store; views: number of global views; out: folder or URL of the store;
    pending: shards that an existing store lacks, None for a new store.
    """
    n, rows, groups = identity.data.images, identity.shard_rows, identity.groups(views)
    kind = build_codec(identity.codec)
    all_views = tuple(view for group in groups for view in group.numbers)
    all_shards = [Shard(b, b * rows, min(n, (b + 1) * rows), all_views) for b in range(-(-n // rows))]
    shards = all_shards if pending is None else pending
    costs = [_shard_cost(identity, kind, shard) for shard in shards]
    found: dict[str, int] = {
        "images": n,
        "views": views,
        "forwards": sum((shard.stop - shard.start) * len(shard.views) for shard in shards),
        "total_forwards": n * len(all_views),
        "bytes": sum(written for written, _ in costs),
        "files": sum(files for _, files in costs),
        "shard_rows": rows,
    }
    others = "".join(f" and {group.count} {group.noun}s" for group in groups[1:])
    text = (
        f"dry run: {n} images x {views} views{others} = {found['total_forwards']} forwards"
        + ("" if pending is None else f", {found['forwards']} of them pending")
        + f"; {format_bytes(found['bytes'])} in {found['files']} files, shards of {rows} rows"
    )
    if not is_url(out):
        found["free_bytes"], folder = free_disk(out)
        text += f"; {format_bytes(found['free_bytes'])} free in {folder}"
    return {"summary": text, **found}


def _shard_cost(identity: StoreIdentity, kind: Codec, shard: Shard) -> tuple[int, int]:
    """(bytes before lossless compression, files) of one shard."""
    columns = {group: len(views) for group, views in by_group(shard.views).items()}
    view_blocks = {group: -(-count // VIEW_BLOCK) for group, count in columns.items()}
    written, files = 0, 2 + sum(view_blocks.values())  # status, content, done records
    for name, shape in identity.arrays.items():
        group = group_of_array(name).name
        written += (shard.stop - shard.start) * columns.get(group, 0) * kind.size(shape)
        files += view_blocks.get(group, 0) * (1 + kind.scaled)
    return written, files


def free_disk(out: str) -> tuple[int, Path]:
    """(free bytes, folder that was asked): `out`, or the nearest folder above it that exists."""
    folder = local_path(out).absolute()
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    return shutil.disk_usage(existing).free, existing
