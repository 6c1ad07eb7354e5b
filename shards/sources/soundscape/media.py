"""The media files of a soundscape, made in parallel and kept between runs.

1. ``records`` plans every clip and writes ``relevance.jsonl``, which needs no media.
2. A process pool renders, encodes and writes the clips that are not there yet.
3. Each clip's record is yielded, in order, once its file is there.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from audiotext_dist import storage
from audiotext_dist.errors import UserError
from shards.executors import map_in_order
from shards.record import Record
from shards.sources.soundscape.pictures import PICTURES_PER_SECOND, render_pictures
from shards.sources.soundscape.relevance import write_relevance
from shards.sources.soundscape.sounds import render_audio
from shards.sources.soundscape.world import ClipScript, SoundscapeConfig, random_state, script

DATASET = "soundscape"
MEDIA_SUFFIX = ".mkv"
CONFIGURATION_FILE = "soundscape.json"
# To be raised with every change that makes the same configuration give other media.
WORLD_VERSION = 1
JPEG_QUANTISER = "3"


def records(config: SoundscapeConfig, num_workers: int) -> Iterator[Record]:
    """Every clip of the configuration, in order; media files that are missing are made on the way.

    Raises:
        UserError: the folder holds the media of another configuration.
    """
    _claim_folder(config)
    scripts = [script(config, number) for number in range(config.num_clips)]
    write_relevance(config, scripts)
    paths = map_in_order(functools.partial(_write_clip, config), range(config.num_clips), num_workers)
    for number, path in paths:
        if not isinstance(path, Path):
            raise UserError(
                f"the process that rendered clip {number} was killed (out of memory?): run it again to go on"
            )
        yield _record(config, number, scripts[number], path)


def encode(audio: NDArray[np.int16], pictures: NDArray[np.uint8], sample_rate_hz: int) -> bytes:
    """A Matroska file of FLAC sound and Motion JPEG pictures; equal input gives equal bytes.

    Args:
        audio: int16 [samples], mono.
        pictures: uint8 RGB [pictures, height, width, 3], ``PICTURES_PER_SECOND`` of them.
    """
    file = io.BytesIO()
    # bitexact leaves out the date, the random ids and the library's version.
    with av.open(file, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        sound = container.add_stream("flac", rate=sample_rate_hz, options={"flags": "+bitexact"})
        sound.layout = "mono"
        sound.format = "s16"
        video = container.add_stream(
            "mjpeg",
            rate=PICTURES_PER_SECOND,
            options={"flags": "+bitexact", "qmin": JPEG_QUANTISER, "qmax": JPEG_QUANTISER, "threads": "1"},
        )
        video.height, video.width = pictures.shape[1:3]
        video.pix_fmt = "yuvj420p"
        samples = av.AudioFrame.from_ndarray(audio[None], format="s16", layout="mono")
        samples.sample_rate = sample_rate_hz
        samples.pts = 0
        container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
    return file.getvalue()


def read_script(media: str, name: str) -> ClipScript:
    """The plan of the clip of this name, of which a folder holds the media.

    Raises:
        UserError: the folder holds no soundscape of this version, or not that clip's split.
    """
    mark = storage.join(media, CONFIGURATION_FILE)
    try:
        found = json.loads(storage.read_bytes(mark))
    except (FileNotFoundError, ValueError):
        found = {}
    if found.pop("world_version", None) != WORLD_VERSION:
        raise UserError(f"{media} holds no soundscape of this version: give a media= folder of python -m shards.build")
    number = name.rpartition("-")[2]
    plan = script(SoundscapeConfig(media=media, **found), int(number)) if number.isdecimal() else None
    if plan is None or plan.name != name:
        raise UserError(f"{media} does not hold clip {name}: give the media folder of its set")
    return plan


def _claim_folder(config: SoundscapeConfig) -> None:
    """Note in the folder which media it holds; num_clips and num_captions do not change a file."""
    ours = {
        "world_version": WORLD_VERSION,
        "seed": config.seed,
        "split": config.split,
        "temporal_disagreement": config.temporal_disagreement,
        "sample_rate_hz": config.sample_rate_hz,
        "picture_pixels": config.picture_pixels,
    }
    mark = storage.join(config.media, CONFIGURATION_FILE)
    if not storage.exists(mark):
        storage.write_bytes(mark, json.dumps(ours, indent=1).encode())
        return
    try:
        theirs = json.loads(storage.read_bytes(mark))
    except ValueError:
        theirs = {}
    if theirs != ours:
        raise UserError(f"{config.media} holds a soundscape of other settings (see {mark}): give another media folder")


def _write_clip(config: SoundscapeConfig, number: int) -> Path:
    plan = script(config, number)
    path = Path(config.media) / f"{plan.name}{MEDIA_SUFFIX}"
    # Files appear by renaming only: one that is there is whole.
    if not path.exists():
        rng = np.random.default_rng(random_state(config, number, "sound").getrandbits(128))
        audio = render_audio(plan, rng, config.sample_rate_hz)
        pictures = render_pictures(plan, random_state(config, number, "pictures"), config.picture_pixels)
        storage.write_bytes(str(path), encode(audio, pictures, config.sample_rate_hz))
    return path


def _record(config: SoundscapeConfig, number: int, plan: ClipScript, path: Path) -> Record:
    return Record(
        name=plan.name,
        media=str(path),
        recording=f"{DATASET}:{config.seed}:{config.split}:{number}",
        captions=[caption.text for caption in plan.captions],
        labels=[sound.event for sound in plan.sounds],
    )
