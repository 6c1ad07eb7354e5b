"""Why a clip cannot be had, and what a person can do about it."""

from __future__ import annotations

from typing import Literal

Reason = Literal[
    "missing",
    "unreadable",
    "truncated",
    "empty",
    "no_audio",
    "silent",
    "no_picture",
    "crashed",
    "timeout",
    "excluded",
]

MENDS: dict[Reason, str] = {
    "missing": "check the media folder",
    "unreadable": "fetch the damaged files again",
    "truncated": "fetch the files that end too early again",
    "empty": "check the files' lengths and the cuts",
    "no_audio": "take files with an audio track",
    "silent": "fetch the files again, or choose channel=mean",
    "no_picture": "give num_frames=0, or require_frames=false",
    "crashed": "look for the cause on stderr, or give workers more memory",
    "timeout": "raise row_timeout_seconds",
    "excluded": "check exclude=",
}


class MediaError(Exception):
    """A clip whose media cannot be had."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason
