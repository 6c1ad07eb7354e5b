"""Index tars made elsewhere, and list a folder's shards: ``python -m shards.index shards=FOLDER key=value ...``

1. Each tar without an index is scanned, and its index written beside it.
2. ``shards.parquet`` lists all of them: a run opens a listed set of any size in seconds, and no tar is scanned again.

A build of ours writes both itself; one from before there were lists is given its list.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from audiotext_dist import storage
from audiotext_dist.configuration import describe, parse
from audiotext_dist.data.index import INDEX_SUFFIX, SHARD_SUFFIX, index_path
from audiotext_dist.data.scan import scan_tar
from audiotext_dist.data.shard import BUILD_SETTINGS
from audiotext_dist.data.shard_list import LIST_NAME, remove_list, write_list
from audiotext_dist.errors import UserError, run_for_people
from shards.finished import list_rows
from shards.passes import default_num_workers, fresh_local_copy, map_shards


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """What is indexed.

    shards: a folder or URL, which must be writable. num_workers: processes; 1 works in this one.
    """

    shards: str = "???"
    num_workers: int = field(default_factory=default_num_workers)

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise UserError(f"num_workers={self.num_workers} must be 1 or more")
        if set(self.shards) & set("{*") or self.shards.endswith(SHARD_SUFFIX):
            raise UserError(f"shards={storage.public_name(self.shards)} must be one folder, without * or braces")


def main() -> None:
    """The command."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(f"{__doc__}\nKeys and defaults:\n\n{describe(IndexConfig)}")
        return
    config = parse(IndexConfig, words)
    num_scanned, num_shards = index_folder(config)
    print(f"{storage.join(config.shards, LIST_NAME)}: {num_shards} shards, {num_scanned} of them scanned now")


def index_folder(config: IndexConfig) -> tuple[int, int]:
    """Scan what has no index, and write the list; (tars that were scanned, shards of the list).

    Raises:
        UserError: no tars, one that is damaged, or an unfinished one of our builds; an index without its tar.
    """
    folder = config.shards.rstrip("/")
    tars = storage.expand(folder, SHARD_SUFFIX)
    # One listing: to ask for each index of a large bucket takes hours.
    indexed = set(storage.list_files(folder, INDEX_SUFFIX))
    missing = [path for path in tars if index_path(path) not in indexed]
    if missing and storage.exists(storage.join(folder, BUILD_SETTINGS)):
        raise UserError(f"{storage.public_name(missing[0])} is not finished: run its build again to the end")
    remove_list(folder)
    for _ in map_shards(_write_index, missing, config.num_workers):
        pass
    rows = list_rows(folder)
    if strangers := {row["name"] for row in rows} - {Path(path).name for path in tars}:
        raise UserError(f"{storage.public_name(folder)} has no {min(strangers)}, only its index: copy it again")
    write_list(folder, rows)
    return len(missing), len(rows)


def _write_index(path: str) -> None:
    with fresh_local_copy(path) as local:
        storage.write_bytes(index_path(path), scan_tar(local, Path(path).name).to_json())


if __name__ == "__main__":
    run_for_people(main)
