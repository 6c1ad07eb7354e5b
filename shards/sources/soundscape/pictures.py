"""The pictures of a clip: events drawn from simple shapes, on a scene that tells the background.

1. ``DRAWINGS`` holds each event as coloured shapes in the unit square.
2. ``_scene`` draws the background once a clip.
3. ``render_pictures`` draws each quarter's event at a new place and size, which trembles from picture to
   picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from shards.sources.soundscape.world import CLIP_SECONDS, NUM_QUARTERS, ClipScript

PICTURES_PER_SECOND = 2
PICTURES_PER_QUARTER = round(CLIP_SECONDS * PICTURES_PER_SECOND) // NUM_QUARTERS

# Share of the picture's width: what sounds low is large.
EVENT_SIZE = {"low": 0.74, "normal": 0.62, "high": 0.50}
SUPERSAMPLING = 2

Colour = tuple[int, int, int]

BLACK, WHITE, GREY, SILVER = (20, 20, 25), (245, 245, 240), (110, 110, 115), (190, 195, 200)
RED, ORANGE, YELLOW, BROWN = (205, 35, 35), (235, 130, 30), (240, 205, 50), (125, 75, 35)
GREEN, DARK_GREEN, BLUE, CYAN = (75, 165, 60), (35, 85, 40), (45, 95, 205), (165, 225, 235)


@dataclass(frozen=True)
class Shape:
    """A filled "ellipse" or "polygon", or a "line" of ``width``; xy in the unit square, y downwards."""

    kind: str
    xy: tuple[float, ...]
    colour: Colour
    width: float = 0.05


def _ellipse(x: float, y: float, radius_x: float, radius_y: float, colour: Colour) -> Shape:
    return Shape("ellipse", (x - radius_x, y - radius_y, x + radius_x, y + radius_y), colour)


def _box(left: float, top: float, right: float, bottom: float, colour: Colour) -> Shape:
    return _polygon(colour, left, top, right, top, right, bottom, left, bottom)


def _polygon(colour: Colour, *xy: float) -> Shape:
    return Shape("polygon", xy, colour)


def _line(colour: Colour, *xy: float, width: float = 0.05) -> Shape:
    return Shape("line", xy, colour, width)


DRAWINGS: dict[str, tuple[Shape, ...]] = {
    "alarm": (
        _polygon(RED, 0.5, 0.05, 0.98, 0.92, 0.02, 0.92),
        _polygon(YELLOW, 0.5, 0.22, 0.84, 0.84, 0.16, 0.84),
        _box(0.46, 0.4, 0.54, 0.64, BLACK),
        _ellipse(0.5, 0.74, 0.05, 0.05, BLACK),
    ),
    "bell": (
        _ellipse(0.5, 0.87, 0.1, 0.1, BROWN),
        _ellipse(0.5, 0.35, 0.27, 0.3, YELLOW),
        _polygon(YELLOW, 0.23, 0.35, 0.77, 0.35, 0.92, 0.82, 0.08, 0.82),
        _line(BROWN, 0.1, 0.74, 0.9, 0.74),
    ),
    "bird": (
        _polygon(BLUE, 0.3, 0.5, 0.0, 0.3, 0.02, 0.62),
        _ellipse(0.48, 0.55, 0.3, 0.22, BLUE),
        _ellipse(0.74, 0.36, 0.16, 0.15, BLUE),
        _polygon(ORANGE, 0.87, 0.3, 1.0, 0.38, 0.87, 0.44),
        _ellipse(0.45, 0.55, 0.16, 0.1, CYAN),
        _ellipse(0.77, 0.33, 0.035, 0.035, BLACK),
        _line(ORANGE, 0.42, 0.75, 0.42, 0.95),
        _line(ORANGE, 0.56, 0.75, 0.56, 0.95),
    ),
    "cat": (
        _polygon(ORANGE, 0.12, 0.05, 0.45, 0.3, 0.12, 0.55),
        _polygon(ORANGE, 0.88, 0.05, 0.55, 0.3, 0.88, 0.55),
        _ellipse(0.5, 0.57, 0.4, 0.36, ORANGE),
        _ellipse(0.34, 0.5, 0.07, 0.09, GREEN),
        _ellipse(0.66, 0.5, 0.07, 0.09, GREEN),
        _polygon(BLACK, 0.43, 0.64, 0.57, 0.64, 0.5, 0.73),
        _line(WHITE, 0.02, 0.62, 0.38, 0.7, width=0.03),
        _line(WHITE, 0.98, 0.62, 0.62, 0.7, width=0.03),
    ),
    "clock": (
        _ellipse(0.5, 0.5, 0.48, 0.48, BLACK),
        _ellipse(0.5, 0.5, 0.39, 0.39, WHITE),
        _line(BLACK, 0.5, 0.5, 0.5, 0.2, width=0.07),
        _line(RED, 0.5, 0.5, 0.74, 0.6, width=0.07),
    ),
    "cricket": (
        _line(BLACK, 0.3, 0.6, 0.1, 0.9),
        _line(BLACK, 0.5, 0.6, 0.45, 0.92),
        _line(BLACK, 0.62, 0.6, 0.42, 0.15, 0.2, 0.85),
        _ellipse(0.48, 0.58, 0.4, 0.13, DARK_GREEN),
        _ellipse(0.86, 0.5, 0.12, 0.13, DARK_GREEN),
        _line(BLACK, 0.9, 0.4, 1.0, 0.08, width=0.03),
    ),
    "dog": (
        _ellipse(0.5, 0.48, 0.34, 0.42, BROWN),
        _ellipse(0.14, 0.45, 0.14, 0.32, BLACK),
        _ellipse(0.86, 0.45, 0.14, 0.32, BLACK),
        _ellipse(0.5, 0.7, 0.22, 0.2, WHITE),
        _ellipse(0.5, 0.62, 0.1, 0.07, BLACK),
        _ellipse(0.36, 0.38, 0.06, 0.06, BLACK),
        _ellipse(0.64, 0.38, 0.06, 0.06, BLACK),
        _ellipse(0.5, 0.88, 0.08, 0.11, RED),
    ),
    "drill": (
        _box(0.2, 0.2, 0.72, 0.5, ORANGE),
        _polygon(BLACK, 0.22, 0.5, 0.45, 0.5, 0.38, 0.92, 0.12, 0.92),
        _polygon(GREY, 0.72, 0.24, 0.84, 0.3, 0.84, 0.4, 0.72, 0.46),
        _line(SILVER, 0.84, 0.35, 1.0, 0.35),
    ),
    "drops": (
        _polygon(BLUE, 0.3, 0.02, 0.5, 0.42, 0.1, 0.42),
        _ellipse(0.3, 0.45, 0.2, 0.18, BLUE),
        _polygon(BLUE, 0.68, 0.38, 0.9, 0.78, 0.46, 0.78),
        _ellipse(0.68, 0.8, 0.22, 0.18, BLUE),
        _ellipse(0.24, 0.45, 0.05, 0.07, WHITE),
        _ellipse(0.61, 0.8, 0.05, 0.07, WHITE),
    ),
    "drum": (
        _box(0.1, 0.42, 0.9, 0.82, RED),
        _ellipse(0.5, 0.82, 0.4, 0.14, RED),
        _ellipse(0.5, 0.42, 0.4, 0.15, WHITE),
        _line(YELLOW, 0.1, 0.5, 0.3, 0.9, 0.5, 0.58, 0.7, 0.9, 0.9, 0.5, width=0.04),
        _line(BROWN, 0.05, 0.05, 0.42, 0.4, width=0.06),
        _line(BROWN, 0.95, 0.05, 0.58, 0.4, width=0.06),
    ),
    "engine": (
        _box(0.08, 0.35, 0.92, 0.85, GREY),
        _box(0.16, 0.12, 0.34, 0.38, SILVER),
        _box(0.41, 0.12, 0.59, 0.38, SILVER),
        _box(0.66, 0.12, 0.84, 0.38, SILVER),
        _ellipse(0.32, 0.62, 0.2, 0.2, BLACK),
        _ellipse(0.32, 0.62, 0.09, 0.09, SILVER),
        _ellipse(0.72, 0.66, 0.13, 0.13, BLACK),
    ),
    "frog": (
        _ellipse(0.25, 0.27, 0.17, 0.17, GREEN),
        _ellipse(0.75, 0.27, 0.17, 0.17, GREEN),
        _ellipse(0.5, 0.6, 0.46, 0.36, GREEN),
        _ellipse(0.25, 0.25, 0.08, 0.08, BLACK),
        _ellipse(0.75, 0.25, 0.08, 0.08, BLACK),
        _line(DARK_GREEN, 0.18, 0.62, 0.35, 0.74, 0.65, 0.74, 0.82, 0.62, width=0.06),
    ),
    "glass": (
        _polygon(CYAN, 0.2, 0.05, 0.42, 0.18, 0.55, 0.04, 0.8, 0.05, 0.68, 0.5, 0.32, 0.5),
        _line(CYAN, 0.5, 0.5, 0.5, 0.9, width=0.08),
        _ellipse(0.5, 0.92, 0.25, 0.06, CYAN),
        _line(BLACK, 0.42, 0.18, 0.55, 0.28, 0.44, 0.48, width=0.035),
        _polygon(CYAN, 0.85, 0.6, 0.98, 0.72, 0.8, 0.8),
        _polygon(CYAN, 0.05, 0.62, 0.2, 0.7, 0.08, 0.84),
    ),
    "horn": (
        _polygon(YELLOW, 0.25, 0.42, 0.8, 0.12, 0.8, 0.88, 0.25, 0.58),
        _ellipse(0.8, 0.5, 0.12, 0.38, BROWN),
        _ellipse(0.15, 0.5, 0.15, 0.17, BLACK),
    ),
    "knock": (
        _box(0.15, 0.0, 0.85, 1.0, BROWN),
        _box(0.25, 0.1, 0.75, 0.42, (165, 110, 60)),
        _box(0.25, 0.58, 0.75, 0.92, (165, 110, 60)),
        _ellipse(0.76, 0.51, 0.07, 0.07, YELLOW),
    ),
    "saw": (
        _polygon(SILVER, 0.3, 0.35, 1.0, 0.35, 1.0, 0.48, 0.3, 0.68),
        _polygon(
            BLACK, 0.3, 0.68, 0.4, 0.76, 0.44, 0.64, 0.55, 0.71, 0.6, 0.59, 0.7, 0.66, 0.75, 0.54, 0.86, 0.61, 0.9, 0.5
        ),
        _polygon(ORANGE, 0.0, 0.25, 0.32, 0.3, 0.32, 0.72, 0.1, 0.8),
        _ellipse(0.17, 0.5, 0.07, 0.11, BLACK),
    ),
    "siren": (
        _ellipse(0.5, 0.55, 0.28, 0.38, RED),
        _box(0.12, 0.72, 0.88, 0.92, BLUE),
        _ellipse(0.42, 0.42, 0.07, 0.12, WHITE),
        _line(YELLOW, 0.02, 0.15, 0.17, 0.3, width=0.07),
        _line(YELLOW, 0.5, 0.0, 0.5, 0.13, width=0.07),
        _line(YELLOW, 0.98, 0.15, 0.83, 0.3, width=0.07),
    ),
    "whistle": (
        _box(0.3, 0.25, 1.0, 0.48, SILVER),
        _ellipse(0.36, 0.55, 0.33, 0.31, SILVER),
        _ellipse(0.36, 0.57, 0.15, 0.15, BLACK),
        _box(0.62, 0.18, 0.74, 0.36, BLACK),
    ),
}


def render_pictures(script: ClipScript, draw: Random, pixels: int) -> NDArray[np.uint8]:
    """The pictures of a clip.

    Returns:
        uint8 RGB [pictures, pixels, pixels, 3], ``PICTURES_PER_SECOND`` of them, in time order.
    """
    scene = _scene(script.background, draw, pixels)
    pitches = {sound.event: sound.pitch for sound in script.sounds}
    pictures = []
    for event in script.shown:
        if event is None:
            pictures += [np.asarray(scene)] * PICTURES_PER_QUARTER
            continue
        pitch = pitches.get(event) or draw.choice(list(EVENT_SIZE))
        side = round(pixels * EVENT_SIZE[pitch] * draw.uniform(0.9, 1.1))
        sprite = _sprite(event, draw, side)
        left, top = (draw.uniform(0, pixels - side) for _ in range(2))
        for _ in range(PICTURES_PER_QUARTER):
            tremble_x, tremble_y = (draw.uniform(-0.03, 0.03) * pixels for _ in range(2))
            picture = scene.copy()
            picture.paste(sprite, (round(left + tremble_x), round(top + tremble_y)), sprite)
            pictures.append(np.asarray(picture))
    return np.stack(pictures)


def _sprite(event: str, draw: Random, side: int) -> Image.Image:
    """The event's drawing, RGBA, with a tint and perhaps mirrored."""
    large = side * SUPERSAMPLING
    sprite = Image.new("RGBA", (large, large))
    pen = ImageDraw.Draw(sprite)
    tint = [draw.uniform(0.85, 1.15) for _ in range(3)]
    for shape in DRAWINGS[event]:
        xy = [large * value for value in shape.xy]
        fill = _tinted(shape.colour, tint)
        if shape.kind == "ellipse":
            pen.ellipse(xy, fill)
        elif shape.kind == "polygon":
            pen.polygon(xy, fill)
        else:
            pen.line(xy, fill, round(large * shape.width), "curve")
    if draw.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return sprite.reduce(SUPERSAMPLING)


def _tinted(colour: Colour, tint: list[float]) -> Colour:
    red, green, blue = (min(255, round(value * factor)) for value, factor in zip(colour, tint, strict=True))
    return red, green, blue


def _scene(background: str, draw: Random, pixels: int) -> Image.Image:
    """The background without any event, RGB."""
    upper, lower, horizon = {
        "crowd": ((150, 130, 165), (110, 90, 125), 0.55),
        "rain": ((95, 105, 120), (70, 85, 85), 0.7),
        "room": ((225, 205, 175), (160, 125, 95), 0.75),
        "street": ((165, 175, 190), (75, 75, 80), 0.6),
        "wind": ((150, 200, 240), (130, 190, 110), 0.65),
    }[background]
    tint = [draw.uniform(0.92, 1.08)] * 3
    scene = Image.new("RGB", (pixels, pixels), _tinted(upper, tint))
    pen = ImageDraw.Draw(scene)
    horizon_y = (horizon + draw.uniform(-0.06, 0.06)) * pixels
    pen.rectangle((0, horizon_y, pixels, pixels), _tinted(lower, tint))
    _furnish(background, pen, draw, pixels, horizon_y)
    return scene


def _furnish(background: str, pen: ImageDraw.ImageDraw, draw: Random, pixels: int, horizon_y: float) -> None:
    """What tells one background from another."""
    unit = pixels / 64
    across = [draw.uniform(0, pixels) for _ in range(24)]
    down = [draw.uniform(0, pixels) for _ in range(24)]
    if background == "crowd":
        for number, x in enumerate(across[:14]):
            y = horizon_y + unit * (2 + number)
            pen.ellipse((x - 4 * unit, y - 9 * unit, x + 4 * unit, y - unit), (215 - 6 * number, 175 - 5 * number, 145))
            pen.rectangle((x - 6 * unit, y - unit, x + 6 * unit, pixels), (70 + 9 * number, 70, 150 - 7 * number))
    elif background == "rain":
        for x, y in zip(across, down, strict=True):
            pen.line((x, y, x - 2 * unit, y + 8 * unit), (185, 200, 220), round(unit))
    elif background == "room":
        left = draw.uniform(4, 40) * unit
        pen.rectangle((left, 8 * unit, left + 18 * unit, 26 * unit), (120, 150, 170), (90, 60, 40), round(2 * unit))
    elif background == "street":
        for x in (0, 22, 44):
            roof_y = horizon_y - draw.uniform(12, 34) * unit
            pen.rectangle((x * unit, roof_y, (x + 17) * unit, horizon_y), (140, 100, 90))
        pen.line((0, horizon_y + 12 * unit, pixels, horizon_y + 12 * unit), (225, 220, 190), round(2 * unit))
    else:
        for x, y in zip(across[:8], down[:8], strict=True):
            pen.arc((x - 8 * unit, 0.6 * y, x + 12 * unit, 0.6 * y + 8 * unit), 180, 330, (235, 245, 250), round(unit))
