"""Soundscape: a small audio-visual world made from a seed, in which both papers' questions have answers.

A clip lasts 10 s. Its event sounds in one or two quarters, over a background; only the pictures of those
quarters show it, the others show distractors (temporal disagreement). Clips share what they contain, so a
caption truly describes several of them, and ``relevance.jsonl`` records which (caption correspondences).

``world`` plans a clip, ``sounds`` and ``pictures`` render it, ``captions`` words it, ``relevance`` tells
which captions describe which clips, ``media`` writes the files.
"""

from shards.sources.soundscape.media import records
from shards.sources.soundscape.relevance import write_relevance
from shards.sources.soundscape.world import ClipScript, SoundscapeConfig, script

__all__ = ["ClipScript", "SoundscapeConfig", "records", "script", "write_relevance"]
