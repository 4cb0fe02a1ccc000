"""What an export would take: forwards, bytes, files, and the free disk."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.runtime.formatting import format_bytes
from compress_ssl.pipeline.runtime.storage import is_url
from compress_ssl.pipeline.store.codecs import codec
from compress_ssl.pipeline.store.layout import VIEW_BLOCK
from compress_ssl.pipeline.store.shards import Shard, is_local
from compress_ssl.pipeline.views.numbering import LOCAL


def estimate(identity: Mapping[str, Any], views: int, out: str, pending: Sequence[Shard] | None) -> dict[str, Any]:
    """{"summary", "forwards", "bytes", ...}; pending: of a store that was begun, None for one that is to be made."""
    n, rows, kind = identity["data"]["images"], identity["shard_rows"], codec(identity["codec"])
    crops = identity.get("local", {}).get("views", 0)
    every = (*range(views), *range(LOCAL, LOCAL + crops))
    whole = [Shard(b, b * rows, min(n, (b + 1) * rows), every) for b in range(-(-n // rows))]
    shards = whole if pending is None else pending
    written, files = map(sum, zip((0, 0), *(_shard(identity, kind, shard) for shard in shards), strict=True))
    found = {
        "images": n,
        "views": views,
        "forwards": sum((shard.stop - shard.start) * len(shard.views) for shard in shards),
        "total_forwards": n * len(every),
        "bytes": written,
        "files": files,
        "shard_rows": rows,
    }
    local = f" and {crops} local crops" if crops else ""
    text = (
        f"dry run: {n} images x {views} views{local} = {found['total_forwards']} forwards"
        + ("" if pending is None else f", {found['forwards']} of them pending")
        + f"; {format_bytes(found['bytes'])} in {files} files, shards of {rows} rows"
    )
    if not is_url(out):
        found["free_bytes"], there = free_disk(out)
        text += f"; {format_bytes(found['free_bytes'])} free in {there}"
    return {"summary": text, **found}


def _shard(identity: Mapping[str, Any], kind: Any, shard: Shard) -> tuple[int, int]:
    """(bytes before lossless compression, files) of one shard."""
    crops = sum(bool(view & LOCAL) for view in shard.views)
    blocks = {False: -(-(len(shard.views) - crops) // VIEW_BLOCK), True: -(-crops // VIEW_BLOCK)}
    written, files = 0, 2 + blocks[False] + blocks[True]  # status, content, done records
    for name, shape in identity["arrays"].items():
        count = (shard.stop - shard.start) * (crops if is_local(name) else len(shard.views) - crops)
        written += count * kind.size(tuple(shape))
        files += blocks[is_local(name)] * (1 + kind.scaled)
    return written, files


def free_disk(out: str) -> tuple[int, Path]:
    """Free bytes, and the folder that was asked: the first there is on the way up."""
    folder = Path(out).expanduser().absolute()
    there = next(p for p in [folder, *folder.parents] if p.exists())
    return shutil.disk_usage(there).free, there
