"""What ``shards.verify`` can find wrong with a set, and how it says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "unfinished",
    "missing_shard",
    "broken_tar",
    "broken_index",
    "wrong_size",
    "wrong_checksum",
    "wrong_index",
    "wrong_list",
    "undecodable",
    "leakage",
    "duplicate_key",
    "empty_caption",
    "no_captions",
    "sample_rates_differ",
    "unstreamable",
]

# Kind -> what it means to a person.
ERRORS: dict[Kind, str] = {
    "unfinished": "a build that was stopped",
    "missing_shard": "a shard is named but not there",
    "broken_tar": "the tar cannot be read",
    "broken_index": "the index cannot be read",
    "wrong_size": "the tar has not the size that its index gives",
    "wrong_checksum": "the tar has not the SHA-256 that its index gives",
    "wrong_index": "the index does not lead to the clips of the tar",
    "wrong_list": "the list of shards is not that of their indexes",
    "undecodable": "training could not read the clip",
    "leakage": "a recording in more than one split",
}
WARNINGS: dict[Kind, str] = {
    "duplicate_key": "more than one clip has this key",
    "empty_caption": "a caption without a letter",
    "no_captions": "a clip without captions",
    "sample_rates_differ": "clips of several sample rates",
    "unstreamable": "webdataset, which reads tars as streams, finds other clips",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. split: or several, separated by spaces. place: a shard, clip or recording."""

    kind: Kind
    split: str
    place: str
    detail: str


def is_error(kind: Kind) -> bool:
    """True where a set is not fit for use; else it is a warning."""
    return kind in ERRORS


def table(findings: Sequence[Finding], num_examples: int) -> Iterator[str]:
    """A line for each kind that was found, with its count, and some examples below it."""
    for kinds, severity in ((ERRORS, "error"), (WARNINGS, "warning")):
        for kind, meaning in kinds.items():
            found = [finding for finding in findings if finding.kind == kind]
            if found:
                yield f"{severity:8}{kind:20}{len(found):>8}  {meaning}"
                yield from (f"{'':8}{example.place}: {example.detail}" for example in found[:num_examples])
                if num_examples and len(found) > num_examples:
                    yield f"{'':8}... and {len(found) - num_examples} more"
