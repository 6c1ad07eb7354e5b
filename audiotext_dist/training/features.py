"""Which feature files a recipe reads, and by which encoders they must have been made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from audiotext_dist import storage
from audiotext_dist.data.encoders import Encoder, Modality, encoder_of, teacher_encoders
from audiotext_dist.data.feature_files import ShardFeatures, feature_path, open_features, read_feature_file
from audiotext_dist.data.features import FeatureReader, Features, Teacher
from audiotext_dist.data.sets import SetConfig
from audiotext_dist.data.shard import Shard
from audiotext_dist.errors import UserError
from audiotext_dist.models.dual_encoder import DualEncoder
from audiotext_dist.retry import RetryConfig
from audiotext_dist.training import weights
from audiotext_dist.training.recipe import Recipe, read_run_recipe

NO_TEACHERS: Mapping[str, str | None] = MappingProxyType({})


def needs_pictures(recipe: Recipe) -> bool:
    """True where the run decodes frames itself."""
    return "image" in recipe.task and recipe.data.frame_features is None


def replaced_encoders(recipe: Recipe, model: DualEncoder) -> dict[Modality, Encoder]:
    """The towers that features speak for in this recipe."""
    names: dict[Modality, str | None] = {"image": recipe.data.frame_features, "text": recipe.data.caption_features}
    return {
        modality: encoder_of(model, recipe.model, recipe.data, modality)
        for modality, name in names.items()
        if name is not None
    }


def features_of(
    recipe: Recipe,
    encoders: dict[Modality, Encoder],
    sets: dict[str, SetConfig],
    opened: Sequence[Sequence[Shard]],
    teachers: Mapping[str, str | None] = NO_TEACHERS,
) -> Features:
    """The features that the recipe names, of some sets together, made by these encoders, and what teachers say.

    Raises:
        UserError: a file is missing, damaged or stale; a teacher's run is none.
    """
    cache = recipe.data.node_cache()

    def files(name: str, made_by: dict[Modality, Encoder]) -> list[ShardFeatures]:
        return [
            file
            for (set_name, chosen), shards in zip(sets.items(), opened, strict=True)
            for file in open_features(shards, name, chosen.features, made_by, set_name, cache.retry)
        ]

    def reader(name: str | None, modality: Modality) -> FeatureReader | None:
        if name is None:
            return None
        return FeatureReader(files(name, {modality: encoders[modality]}), modality, cache)

    def teacher(name: str, run: str | None) -> Teacher:
        first = feature_path(opened[0][0], name, next(iter(sets.values())).features)
        in_file = _encoders_in(first, cache.retry)
        found = files(name, _both(in_file, first, name) if run is None else _encoders_of_run(run, in_file))
        return Teacher(audio=FeatureReader(found, "audio", cache), captions=FeatureReader(found, "text", cache))

    return Features(
        frames=reader(recipe.data.frame_features, "image"),
        captions=reader(recipe.data.caption_features, "text"),
        teachers=tuple(teacher(name, run) for name, run in teachers.items()),
    )


def _encoders_of_run(run: str, in_file: Mapping[Modality, Encoder]) -> dict[Modality, Encoder]:
    recipe = read_run_recipe(Path(run))
    if recipe.task != "audio-text":
        raise UserError(f"data.teachers: {run} has task={recipe.task}: a teacher is an audio-text run")
    encoders = teacher_encoders(weights.read_weights(run), recipe.model, recipe.data)
    if recipe.model.audio.window_seconds is not None and "audio" in in_file:
        # A tower of windows hears as much of a clip as launch/embed.py was told, which may be more than in training.
        audio, heard_seconds = encoders["audio"], in_file["audio"].preprocessing.get("clip_seconds")
        if isinstance(heard_seconds, int | float) and heard_seconds > recipe.data.clip_seconds:
            encoders["audio"] = replace(audio, preprocessing={**audio.preprocessing, "clip_seconds": heard_seconds})
    return encoders


def _encoders_in(first: str, retry: RetryConfig) -> Mapping[Modality, Encoder]:
    """Who made the first file; nobody where it is missing, which will be told when all are opened."""
    try:
        return read_feature_file(first, retry).header.encoders
    except FileNotFoundError:
        return {}


def _both(in_file: Mapping[Modality, Encoder], first: str, name: str) -> dict[Modality, Encoder]:
    """Who made the first file, and so must have made all, of features whose run is not named."""
    if in_file and not {"audio", "text"} <= in_file.keys():
        raise UserError(
            f"{storage.public_name(first)} is of {', '.join(in_file)}: make the features of data.teachers.{name} with "
            "launch/embed.py run=RUN, by both towers"
        )
    return {modality: encoder for modality, encoder in in_file.items() if modality != "image"}
