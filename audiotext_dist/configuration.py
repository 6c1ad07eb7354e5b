"""Typed configuration: frozen dataclasses read from YAML and ``key=value`` words, with errors for people."""

from __future__ import annotations

import inspect
import textwrap
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from audiotext_dist.errors import UserError, did_you_mean

Config = TypeVar("Config")


def parse(schema: type[Config], words: Sequence[str], yaml_file: str | None = None) -> Config:
    """Defaults of ``schema``, then the YAML file, then each ``key=value`` word; later ones win.

    A word that gives a whole mapping (``data.train={}``) replaces the file's.

    Args:
        schema: a frozen keyword-only dataclass; nested ones and ``dict[str, dataclass]`` are followed.
        words: ``data.train.esc.weight=2``; values are YAML (``[1,2]``, ``null``, ``true``).
        yaml_file: a file of the same keys, nested. ``base: FILE``, relative to its own folder, names another such
            file, whose keys it changes; ``base: [FILE, FILE]`` several, later ones win. A base may have a base.

    Raises:
        UserError: one line that names the key and the mend.
    """
    return _build(_read(schema, words, yaml_file), schema)


def parse_unresolved(schema: type[Any], words: Sequence[str], yaml_file: str) -> dict[str, Any]:
    """As ``parse``, but plain mappings, in which every ``${name}`` stands as it was written.

    Raises:
        UserError: as ``parse``; a required key has no value.
    """
    config = _read(schema, words, yaml_file)
    found = typing.cast(dict[str, Any], OmegaConf.to_container(config))
    missing = _first_missing(found)
    if missing is not None:
        raise UserError(f"'{missing}' in {yaml_file} has no value: give {missing}=...")
    return found


def _first_missing(found: dict[str, Any], prefix: str = "") -> str | None:
    for key, value in found.items():
        deeper = _first_missing(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        if deeper is not None or value == MISSING:
            return deeper or f"{prefix}{key}"
    return None


def _read(schema: type[Any], words: Sequence[str], yaml_file: str | None) -> Any:
    given = OmegaConf.create() if yaml_file is None else _read_with_bases(yaml_file)
    for word in words:
        _apply(given, word)
    return _merge(schema, given, [word.partition("=")[0] for word in words], yaml_file)


def to_yaml(config: Any) -> str:
    """The whole configuration, every key with its value, as YAML that ``parse`` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """The whole configuration as plain nested dictionaries, for loggers."""
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(plain, dict)
    return typing.cast(dict[str, Any], plain)


def describe(schema: type[Any], prefix: str = "") -> str:
    """A ``--help`` listing: every key with its default, each group headed by its class's docstring."""
    lines = []
    hints = typing.get_type_hints(schema)
    defaults = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(schema)))
    for entry in fields(schema):
        inner = _dataclass_inside(hints[entry.name])
        if inner is None:
            value = defaults[entry.name]
            lines.append(f"  {prefix}{entry.name}={'(required)' if value == MISSING else value}")
        else:
            is_mapping = typing.get_origin(hints[entry.name]) is dict
            deeper = f"{prefix}{entry.name}.{'NAME.' if is_mapping else ''}"
            meaning = inspect.cleandoc(inner.__doc__ or "").partition("\n\nRaises:")[0].replace("\n\n", " ")
            heading = textwrap.fill(f"{deeper[:-1]}: {meaning}", 110, initial_indent="  ", subsequent_indent="    ")
            lines += ["", heading, describe(inner, deeper)]
    return "\n".join(lines)


def _read_with_bases(yaml_file: str, readers: Sequence[Path] = ()) -> DictConfig:
    """The file's keys over those of its bases; readers: the files that led here, each a base of the one before."""
    found = _read_yaml(yaml_file)
    given = found.pop("base", ListConfig([]))
    readers = [*readers, Path(yaml_file).resolve()]
    merged = OmegaConf.create()
    for base in given if isinstance(given, ListConfig) else [given]:
        if not isinstance(base, str):
            raise UserError(f"base={base} in {yaml_file} is no file's name: give a path relative to that file")
        base_file = Path(yaml_file).parent / base
        if base_file.resolve() in readers:
            raise UserError(f"base={base} in {yaml_file} leads back to itself: take it out of one of the files")
        if not base_file.is_file():
            raise UserError(f"no base file at {base_file}: mend base={base} in {yaml_file}, relative to that file")
        merged.merge_with(_read_with_bases(str(base_file), readers))
    merged.merge_with(found)
    return merged


def _read_yaml(yaml_file: str) -> DictConfig:
    if not Path(yaml_file).is_file():
        raise UserError(f"no recipe file at {yaml_file}: check the path")
    try:
        found = OmegaConf.load(yaml_file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{yaml_file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, DictConfig):
        raise UserError(f"{yaml_file} holds no 'key: value' mapping")
    return found


def _apply(given: DictConfig, word: str) -> None:
    """Set a word's key; a whole mapping (``data.train={}``) takes the place of the one that was there."""
    key, equals, text = word.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"cannot read '{word}': options are written key=value")
    try:
        # To a plain mapping, in which a ${name} stays as it is.
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        OmegaConf.update(given, key, typing.cast(dict[str, Any], value)["value"], merge=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        mend = f"put a text with special characters in quotes, '{key}=\"...\"'"
        raise UserError(f"cannot read the value of '{word}' ({_first_line(error)}): {mend}") from None


def _merge(schema: type[Any], given: DictConfig, words_keys: Sequence[str], yaml_file: str | None) -> Any:
    def where(key: str) -> str:
        in_words = any(word == key or word.startswith(f"{key}.") for word in words_keys)
        return "" if in_words or yaml_file is None else f" in {yaml_file}"

    try:
        return OmegaConf.merge(OmegaConf.structured(schema), given)
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        mend = did_you_mean(key, _all_keys(schema, key), otherwise="--help lists the keys")
        raise UserError(f"unknown key '{key}'{where(key)}: {mend}") from None
    except (OmegaConfBaseException, TypeError) as error:
        key = str(getattr(error, "full_key", "") or "")
        named = f" for '{key}'{where(key)}" if key else ""
        raise UserError(f"wrong value{named}: {_first_line(error)}") from None


def _build(config: Any, schema: type[Config]) -> Config:
    try:
        built = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise UserError(f"'{error.full_key}' has no value: give {error.full_key}=...") from None
    except UserError:
        raise
    except OmegaConfBaseException as error:
        # OmegaConf wraps what a __post_init__ raises.
        cause = error.__cause__ or error.__context__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(_first_line(error)) from None
    assert isinstance(built, schema)
    _check_lists(built)
    return built


def _check_lists(built: Any, prefix: str = "") -> None:
    """To YAML ``[A man speaks: hello]`` is a mapping in a list, which OmegaConf takes for a text."""
    for entry in fields(built):
        key, value = prefix + entry.name, getattr(built, entry.name)
        if is_dataclass(value):
            _check_lists(value, f"{key}.")
        elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
            raise UserError(f"wrong value for '{key}': put a text with special characters in quotes, '{key}=[\"...\"]'")


def _dataclass_inside(hint: Any) -> type[Any] | None:
    """The dataclass of ``X``, ``X | None`` or ``dict[str, X]``."""
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    if typing.get_origin(hint) in (dict, types.UnionType, typing.Union):
        return next(filter(None, map(_dataclass_inside, typing.get_args(hint))), None)
    return None


def _all_keys(schema: type[Any], asked: str) -> list[str]:
    """Every key of the schema in full; a mapping's NAME is taken from the key that was asked for."""
    keys: list[str] = []

    def walk(level: type[Any], prefix: str) -> None:
        hints = typing.get_type_hints(level)
        for entry in fields(level):
            path = prefix + entry.name
            keys.append(path)
            inner = _dataclass_inside(hints[entry.name])
            if inner is None:
                continue
            if typing.get_origin(hints[entry.name]) is dict:
                rest = asked[len(path) + 1 :] if asked.startswith(path + ".") else ""
                path += "." + (rest.partition(".")[0] or "NAME")
            walk(inner, path + ".")

    walk(schema, "")
    return keys


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
