"""Captions for clips that have only a class: ``python -m shards.class_captions table=FILE class_column=NAME out=FILE``.

1. The list is read as ``shards.build table`` reads it; ``rename={dog bark: dog}`` gives a class another one's name,
   where a list tells one class in two ways.
2. Each clip gets some of ten ways to say its class, drawn by its name: other clips of the class are told in other
   words, or by chance in the same ones. So a caption truly describes every clip of its class.
3. The list is written again as JSON lines, with the classes renamed and the captions in a column of their own.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from audiotext_dist import storage
from audiotext_dist.configuration import describe, parse
from audiotext_dist.errors import UserError, run_for_people
from shards.sources.table import read_rows

PHRASES = (
    "The sound of {}",
    "A recording of {}",
    "{} can be heard",
    "Someone recorded {}",
    "{} in the distance",
    "One hears {} here",
    "There is {} in this clip",
    "{}, and nothing else",
    "A short clip of {}",
    "This must be {}",
)


@dataclass(frozen=True, kw_only=True)
class ClassCaptionsConfig:
    """The list and its columns.

    table: csv, tsv, jsonl or parquet. class_column: the class, its words joined by spaces or underscores. rename: the
    name in place of a class's own, both as the list writes them; out holds it in class_column, too. name_column: what
    tells clips apart. file_pattern: a clip's path in the folder that media= of the build names, made of columns
    (``fold{fold}/{name}``); null leaves the list's column file as it is. out: a .jsonl file. num_captions: of each
    clip. seed: of the draw.
    """

    table: str = "???"
    class_column: str = "???"
    rename: dict[str, str] = field(default_factory=dict)
    name_column: str = "???"
    file_pattern: str | None = None
    out: str = "???"
    num_captions: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_captions <= len(PHRASES):
            raise UserError(f"num_captions={self.num_captions}: give a number from 1 to {len(PHRASES)}")
        if not self.out.endswith(".jsonl"):
            raise UserError(f"out={self.out}: give a name that ends with .jsonl")


def class_captions(config: ClassCaptionsConfig) -> int:
    """Write the list with captions; how many clips it has.

    Raises:
        UserError: the list cannot be read, or lacks a column or a class to rename.
    """
    lines = []
    not_met = set(config.rename)
    for place, row in read_rows(Path(config.table)):
        for column in (config.class_column, config.name_column):
            if not row.get(column):
                raise UserError(f"{place} has nothing in column '{column}': its columns are {', '.join(row)}")
        own = str(row[config.class_column])
        not_met.discard(own)
        row[config.class_column] = config.rename.get(own, own)
        thing = row[config.class_column].replace("_", " ").lower()
        phrases = Random(f"{config.seed}/{row[config.name_column]}").sample(PHRASES, config.num_captions)
        captions = [_sentence(phrase.format(thing)) for phrase in phrases]
        file = {} if config.file_pattern is None else {"file": _path(config.file_pattern, row, place)}
        lines.append(json.dumps({**row, **file, "captions": captions}, ensure_ascii=False))
    if not_met:
        raise UserError(f"no clip of {config.table} is of class '{min(not_met)}': mend rename=")
    storage.write_bytes(config.out, "\n".join([*lines, ""]).encode())
    return len(lines)


def _path(pattern: str, row: dict[str, Any], place: str) -> str:
    try:
        return pattern.format_map(row)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{place}: file_pattern={pattern} asks for {error}: its columns are {', '.join(row)}") from None


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def main() -> None:
    """The command."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        meaning = inspect.cleandoc(ClassCaptionsConfig.__doc__ or "")
        print(f"{inspect.cleandoc(__doc__ or '')}\n\n{meaning}\n\nKeys:\n{describe(ClassCaptionsConfig)}")
        return
    config = parse(ClassCaptionsConfig, words)
    print(f"{class_captions(config):,} clips with {config.num_captions} captions each in {config.out}")


if __name__ == "__main__":
    run_for_people(main)
