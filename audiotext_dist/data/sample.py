"""THE sample contract: how one clip lies in a tar shard. No other file knows the member names.

    {key}.flac      mono PCM16 FLAC at the build's sample rate
    {key}.json      ClipMetadata
    {key}.0.jpg ... {key}.{L-1}.jpg     the clip's frames in time order

``webdataset``, LAION-CLAP's and open_clip's loaders read such a shard as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from dataclasses import dataclass, field, fields

AUDIO_MEMBER = "flac"
METADATA_MEMBER = "json"
FRAME_SUFFIX = ".jpg"
FLAC_HEADER_BYTES = 4096  # at least: the header, and some of the first frames

_FRAME_MEMBER = re.compile(rf"[0-9]+{re.escape(FRAME_SUFFIX)}")
_UNSAFE_IN_KEY = re.compile(r"[^A-Za-z0-9_-]+")
MAX_KEY_LENGTH = 120
MAX_MEMBER_BYTES = 1 << 28  # of what may stand in a tar by mistake or malice, so much is read


def frame_member(frame: int) -> str:
    """Member name of the frame with this number: ``0.jpg``, ``1.jpg``, ..."""
    return f"{frame}{FRAME_SUFFIX}"


def is_member(name: str) -> bool:
    """True for the member names of a sample: any other is not ours, and passed over."""
    return name in (AUDIO_MEMBER, METADATA_MEMBER) or bool(_FRAME_MEMBER.fullmatch(name))


def split_member(tar_name: str) -> tuple[str, str]:
    """``dir/key.0.jpg`` -> (``dir/key``, ``0.jpg``): WebDataset's rule, the key ends at the first dot."""
    folder, slash, base = tar_name.rpartition("/")
    key, _, member = base.partition(".")
    return folder + slash + key, member


def checksum(member: str, content: bytes) -> int:
    """CRC-32 of what nothing else protects: a FLAC's header, whose frames have checksums of their own, or all."""
    return zlib.crc32(content[:FLAC_HEADER_BYTES] if member == AUDIO_MEMBER else content)


def safe_key(name: str) -> str:
    """A key WebDataset can hold (no dot, no slash, not too long), distinct for distinct names.

    A name that is safe already stays as it is; any other gets a digest of itself, so that ``a.b`` and
    ``a/b`` do not meet.
    """
    if name and len(name) <= MAX_KEY_LENGTH and not _UNSAFE_IN_KEY.search(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{_UNSAFE_IN_KEY.sub('_', name)[: MAX_KEY_LENGTH - 11]}-{digest}"


def youtube_recording(ytid: str) -> str:
    """The canonical id of a YouTube segment, equal in AudioSet, AudioCaps and WavCaps' AudioSet part.

    It is the video, not the segment: WavCaps gives no start, and nothing is lost, since those datasets take
    one segment a video (AudioSet balanced and evaluation: 42,531 segments of 42,531 videos; AudioCaps: 51,308
    of 51,308). Where a list has two segments of one video (VGGSound's may), they count as one recording: held
    apart from a test set together, and neither a negative of the other.
    """
    return f"youtube:{ytid}"


def freesound_recording(freesound_id: str) -> str:
    """The canonical id of a Freesound upload, equal in every dataset drawn from Freesound."""
    return f"freesound:{freesound_id}"


_JSON_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("recording", "dataset", "name"), str),
    **dict.fromkeys(("start", "duration", "sample_rate"), (int, float)),
    **dict.fromkeys(("labels", "frame_times"), list),
}


@dataclass(frozen=True, kw_only=True)
class ClipMetadata:
    """The ``{key}.json`` of a clip; field names are the JSON's.

    text: captions, possibly none. recording: canonical id, equal for the same source segment in any
    dataset. start: seconds into the original file. duration: seconds. frame_times: seconds from the clip's
    start, one a frame. name: the clip's name in its dataset, before it was made a safe key.
    """

    text: list[str]
    recording: str
    dataset: str
    labels: list[str] = field(default_factory=list)
    start: float = 0.0
    duration: float
    sample_rate: int
    frame_times: list[float] = field(default_factory=list)
    name: str = ""

    def to_json(self) -> bytes:
        """Compact UTF-8 JSON, keys in the order of the fields."""
        return json.dumps(vars(self), ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, content: bytes, key: str) -> ClipMetadata:
        """Read a clip's JSON; shards from elsewhere may hold only ``text`` (a caption or a list of them).

        Raises:
            ValueError: not JSON, not an object, or a caption that is no text.
        """
        try:
            found = json.loads(content)
        except RecursionError:
            raise ValueError(f"{key}.json is nested too deeply") from None
        if not isinstance(found, dict):
            raise ValueError(f"{key}.json holds a {type(found).__name__}, not an object")
        text = found.get("text", [])
        text = [text] if isinstance(text, str) else text
        if not isinstance(text, list) or not all(isinstance(caption, str) for caption in text):
            raise ValueError(f"{key}.json: 'text' must be a caption or a list of captions")
        "".join(text).encode()  # half a character, which JSON can hold, is a ValueError
        for name, kind in _JSON_KINDS.items():
            if name in found and not isinstance(found[name], kind):
                raise ValueError(f"{key}.json: '{name}' must not be {json.dumps(found[name])[:40]}")
        known = {entry.name for entry in fields(cls)}
        defaults = {"recording": key, "dataset": "", "duration": 0.0, "sample_rate": 0}
        return cls(**{**defaults, **{name: found[name] for name in known & found.keys()}, "text": text})


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One clip, encoded, as a shard holds it."""

    key: str
    metadata: ClipMetadata
    flac: bytes
    frames: list[bytes] = field(default_factory=list)

    def members(self) -> dict[str, bytes]:
        """Member name -> content, in the order they are written."""
        return {
            AUDIO_MEMBER: self.flac,
            METADATA_MEMBER: self.metadata.to_json(),
            **{frame_member(number): jpeg for number, jpeg in enumerate(self.frames)},
        }
