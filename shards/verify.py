"""Prove finished sets: ``python -m shards.verify train=FOLDER test=FOLDER key=value ...``

Every word that is no option names a split and its shards; several folders are joined by ``::``.

1. Each folder: is the build at its end, is every shard of its report there, is every tar indexed.
2. Each shard, in parallel: its size, its SHA-256 and the place of every member, by a scan of the tar.
3. Each clip: metadata, audio and frames through the reader that training uses.
4. All splits together: keys that come twice, and recordings that two splits share.

Errors (a broken shard, a clip that training could not read, leakage) end in exit code 1; warnings do not.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

from audiotext_dist import storage
from audiotext_dist.configuration import describe, parse
from audiotext_dist.data.index import INDEX_SUFFIX, SHARD_SUFFIX, index_path
from audiotext_dist.data.shard import BUILD_SETTINGS
from audiotext_dist.data.shard_list import LIST_NAME
from audiotext_dist.errors import UserError, run_for_people
from shards.findings import Finding, Kind, is_error, table
from shards.finished import list_problem
from shards.passes import default_num_workers, map_shards
from shards.report import REPORT_NAME, count_values, from_parquet
from shards.verify_shard import ShardFacts, check_shard

USAGE = """usage: python -m shards.verify SPLIT=SHARDS ... key=value ...

SHARDS is a folder, a glob or {00000..00099}.tar braces, local or a URL; '::' joins several. Example:
  python -m shards.verify train=shards/audiocaps::shards/wavcaps test=shards/clotho-test json=verified.json

Keys and defaults:

"""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What is verified.

    splits: name -> shards. decode: also decode every clip's audio and frames. num_workers: processes; 1
    works in this one. json: a file for the result, for machines. examples: findings of each kind that are
    shown; the JSON holds them all.
    """

    splits: dict[str, str] = field(default_factory=dict)
    decode: bool = True
    num_workers: int = field(default_factory=default_num_workers)
    json: str | None = None
    examples: int = 3

    def __post_init__(self) -> None:
        if not self.splits:
            raise UserError("nothing to verify: name a split and its shards, train=FOLDER")
        if self.num_workers < 1 or self.examples < 0:
            raise UserError("num_workers must be 1 or more and examples 0 or more")


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """What a split holds, as far as it could be read."""

    shards: int
    clips: int
    captions: int
    hours: float
    sample_rates_hz: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result: what the splits hold and what is wrong with them."""

    splits: dict[str, SplitSummary]
    findings: list[Finding]

    @property
    def num_errors(self) -> int:
        """Findings that are errors."""
        return sum(is_error(finding.kind) for finding in self.findings)

    def to_json(self) -> bytes:
        """The whole result; ``counts`` has one entry a kind of finding."""
        return json.dumps(
            {
                "clean": self.num_errors == 0,
                "splits": {name: asdict(summary) for name, summary in self.splits.items()},
                "counts": Counter(finding.kind for finding in self.findings),
                "findings": [
                    {"severity": "error" if is_error(finding.kind) else "warning", **asdict(finding)}
                    for finding in self.findings
                ],
            },
            ensure_ascii=False,
            indent=1,
        ).encode()


def main() -> None:
    """The command."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(USAGE + describe(VerifyConfig))
        return
    config = parse(VerifyConfig, [_option(word) for word in words])
    result = verify(config)
    print(summary(result, config.examples))
    if config.json is not None:
        storage.write_bytes(config.json, result.to_json())
    if result.num_errors:
        raise SystemExit(1)


def verify(config: VerifyConfig) -> Verification:
    """Check every shard of every split.

    Raises:
        UserError: a split names no shards, or a worker was killed.
    """
    findings: list[Finding] = []
    shards: list[tuple[str, str]] = []
    for split, spec in config.splits.items():
        paths = storage.expand(spec, SHARD_SUFFIX)
        findings += _check_folders(split, paths)
        shards += [(split, path) for path in paths]
    facts = list(map_shards(partial(check_shard, decode=config.decode), shards, config.num_workers))
    findings += [finding for shard in facts for finding in shard.findings]
    findings += _check_rates(facts)
    findings += _check_keys(facts)
    findings += _check_leakage(facts)
    return Verification(splits={split: _summary_of(split, facts) for split in config.splits}, findings=findings)


def summary(result: Verification, num_examples: int) -> str:
    """The result as a table for a person."""
    splits = [
        f"{name}: {split.clips} clips in {split.shards} shards, {split.hours:.2f} hours, {split.captions} captions, "
        + ", ".join(f"{rate_hz} Hz" for rate_hz in split.sample_rates_hz)
        for name, split in result.splits.items()
    ]
    num_warnings = len(result.findings) - result.num_errors
    verdict = (
        f"{'clean' if not result.num_errors else 'NOT clean'}: {result.num_errors} errors, {num_warnings} warnings"
    )
    return "\n".join([*splits, *table(result.findings, num_examples), verdict])


def _option(word: str) -> str:
    """``train=x`` is short for ``splits.train=x``."""
    name, equals, _ = word.partition("=")
    options = {entry.name for entry in fields(VerifyConfig)}
    return f"splits.{word}" if equals and name.isidentifier() and name not in options else word


def _check_folders(split: str, paths: Sequence[str]) -> Iterator[Finding]:
    """What the folders of these shards say of them: index files and the report of the build."""
    for folder in sorted({path.rpartition("/")[0] or "." for path in paths}):
        public = storage.public_name(folder)
        indexes = {Path(path).name for path in storage.list_files(folder, INDEX_SUFFIX)}
        inside = {Path(path).name for path in paths if (path.rpartition("/")[0] or ".") == folder}
        if indexes:
            for name in sorted(inside):
                if Path(index_path(name)).name not in indexes:
                    yield Finding("unfinished", split, f"{public}/{name}", "a tar without index: run the build again")
        present = {Path(path).name for path in storage.list_files(folder, SHARD_SUFFIX)}
        for name in sorted(indexes):
            if (tar := name.removesuffix(INDEX_SUFFIX) + SHARD_SUFFIX) not in present:
                yield Finding("missing_shard", split, f"{public}/{tar}", "its index is there, the tar is not")
        yield from _check_report(split, folder, present)
        if problem := list_problem(folder):
            yield Finding("wrong_list", split, f"{public}/{LIST_NAME}", problem)


def _check_report(split: str, folder: str, present: set[str]) -> Iterator[Finding]:
    public, report = storage.public_name(folder), storage.join(folder, REPORT_NAME)
    if storage.exists(report):
        written = count_values(from_parquet(storage.read_bytes(report)), "shard")
        for name in sorted(written.keys() - present):
            yield Finding("missing_shard", split, f"{public}/{name}", f"the report has {written[name]} clips in it")
    elif storage.exists(storage.join(folder, BUILD_SETTINGS)):
        yield Finding("unfinished", split, public, "the build has not come to its end: run it again")


def _check_rates(facts: Sequence[ShardFacts]) -> Iterator[Finding]:
    rates_hz: dict[int, Counter[str]] = {}
    for shard in facts:
        for rate_hz, count in shard.sample_rates_hz.items():
            rates_hz.setdefault(rate_hz, Counter())[shard.split] += count
    if len(rates_hz) > 1:
        for rate_hz, clips in sorted(rates_hz.items()):
            detail = ", ".join(f"{count} clips of {split}" for split, count in clips.items())
            yield Finding("sample_rates_differ", " ".join(clips), f"{rate_hz} Hz", detail)


def _check_keys(facts: Sequence[ShardFacts]) -> Iterator[Finding]:
    return _shared("duplicate_key", [(shard, key, key) for shard in facts for key in shard.keys], across=False)


def _check_leakage(facts: Sequence[ShardFacts]) -> Iterator[Finding]:
    clips = [
        (shard, recording, key)
        for shard in facts
        for recording, key in zip(shard.recordings, shard.keys, strict=True)
        if recording != key  # clips of another maker, who says nothing of recordings
    ]
    return _shared("leakage", clips, across=True)


def _shared(kind: Kind, clips: Sequence[tuple[ShardFacts, str, str]], *, across: bool) -> Iterator[Finding]:
    """Names that several clips bear; ``across``: only those that two splits share."""
    bearers: dict[str, list[tuple[str, str]]] = {}
    for shard, name, key in clips:
        bearers.setdefault(name, []).append((shard.split, f"{shard.split} {shard.public_path} {key}"))
    for name, found in bearers.items():
        splits = sorted({split for split, _ in found})
        if len(found) > 1 and (len(splits) > 1 or not across):
            yield Finding(kind, " ".join(splits), name, "; ".join(place for _, place in found[:4]))


def _summary_of(split: str, facts: Sequence[ShardFacts]) -> SplitSummary:
    own = [shard for shard in facts if shard.split == split]
    rates_hz = sum((shard.sample_rates_hz for shard in own), Counter[int]())
    return SplitSummary(
        shards=len(own),
        clips=sum(len(shard.keys) for shard in own),
        captions=sum(shard.num_captions for shard in own),
        hours=sum(shard.seconds for shard in own) / 3600,
        sample_rates_hz=dict(sorted(rates_hz.items())),
    )


if __name__ == "__main__":
    run_for_people(main)
