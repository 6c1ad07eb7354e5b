"""What a source says of one clip, before any media is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One row of a dataset's list.

    A list may have millions of rows, so a row is small: no Path, no dictionary, and sources share equal labels.

    name: the clip's name in its dataset, unique there. media: its file, or None where it is missing.
    start_seconds, end_seconds: the cut inside the file; None takes the whole file. excluded_by: the
    exclusion lists that name the clip; one that any list names is not packed.
    """

    name: str
    media: str | None
    recording: str
    captions: Sequence[str] = ()
    labels: Sequence[str] = ()
    start_seconds: float | None = None
    end_seconds: float | None = None
    excluded_by: tuple[str, ...] = ()
