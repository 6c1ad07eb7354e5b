"""A contact sheet of queries and what was found for them: one picture, 1000 pixels wide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from audiotext_dist.evaluation.spectrogram import RANGE_DB, font

_WIDTH, _MARGIN, _GAP = 1000, 10, 8
_QUERY_WIDTH, _OWN_WIDTH, _FOUND_WIDTH = 168, 190, 115
_PICTURE_HEIGHT, _LINE_HEIGHT, _HEAD_HEIGHT = 76, 13, 50
OWN_SIZE, FOUND_SIZE = (_OWN_WIDTH, _PICTURE_HEIGHT + 2 * _LINE_HEIGHT), (_FOUND_WIDTH, _PICTURE_HEIGHT)
_ROW_HEIGHT = 17 + _PICTURE_HEIGHT + 2 * _LINE_HEIGHT + 12
_MAX_CHARACTERS = 400
_INK, _FAINT, _PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)
_RIGHT, _WRONG = (0, 120, 60), (190, 40, 40)


@dataclass(frozen=True, kw_only=True)
class FoundCell:
    """One found clip; its picture has at most FOUND_SIZE."""

    text: str
    score: float
    is_right: bool
    picture: Image.Image


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """A query, the clip that it belongs to, a picture of at most OWN_SIZE, and the found ones, best first."""

    query: str
    query_frame: Image.Image | None
    rank: int
    own: Image.Image
    found: list[FoundCell]


def draw_sheet(title: str, own_title: str, rows: Sequence[SheetRow], *, has_sound: bool) -> Image.Image:
    """The whole sheet; green frames are right ones, red ones wrong. has_sound: pictures are spectrograms."""
    sheet = Image.new("RGB", (_WIDTH, _HEAD_HEIGHT + _ROW_HEIGHT * len(rows) + 26), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 6), title, font=font(14, bold=True), fill=_INK)
    for x, text in ((_MARGIN, "query"), (_own_left(), own_title), (_found_left(0), "found, best first: cosine")):
        draw.text((x, 30), text, font=font(11), fill=_FAINT)
    for number, row in enumerate(rows):
        _draw_row(sheet, draw, _HEAD_HEIGHT + number * _ROW_HEIGHT, row)
    note = "green: right, red: wrong"
    if has_sound:
        note += f"; spectrograms: time in s, mel-spaced frequency in kHz, the loudest {RANGE_DB:.0f} dB of each clip"
    draw.text((_MARGIN, sheet.height - 20), note, font=font(11), fill=_FAINT)
    return sheet


def _own_left() -> int:
    return _MARGIN + _QUERY_WIDTH + _GAP


def _found_left(place: int) -> int:
    return _own_left() + _OWN_WIDTH + _GAP + place * (_FOUND_WIDTH + _GAP)


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int, row: SheetRow) -> None:
    draw.line([(_MARGIN, top - 3), (_WIDTH - _MARGIN, top - 3)], fill=(215, 215, 215))
    pictures_top = top + 17
    if row.query_frame is not None:
        sheet.paste(row.query_frame.resize((_PICTURE_HEIGHT, _PICTURE_HEIGHT)), (_MARGIN, pictures_top))
    else:
        _write(draw, (_MARGIN, pictures_top - 2), row.query, font(12), _QUERY_WIDTH, 6, _INK)
    colour = _RIGHT if row.rank == 1 else _INK
    draw.text((_MARGIN, top), f"right one at rank {row.rank}", font=font(11, bold=True), fill=colour)
    sheet.paste(row.own, (_own_left(), pictures_top - 5))
    for place, found in enumerate(row.found):
        left, colour = _found_left(place), _RIGHT if found.is_right else _WRONG
        draw.text((left, top), f"{found.score:.3f}", font=font(11, bold=True), fill=colour)
        if found.is_right:
            draw.text((left + _FOUND_WIDTH, top), "right", font=font(11), fill=colour, anchor="ra")
        sheet.paste(found.picture, (left, pictures_top))
        corner = (left + found.picture.width - 1, pictures_top + found.picture.height - 1)
        draw.rectangle([(left, pictures_top), corner], outline=colour, width=2)
        _write(draw, (left, pictures_top + _PICTURE_HEIGHT + 2), found.text, font(10), _FOUND_WIDTH, 2, _INK)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    face: ImageFont.FreeTypeFont,
    width: int,
    max_lines: int,
    colour: tuple[int, int, int],
) -> None:
    """Text within a width; what does not fit ends in an ellipsis."""
    lines = [""]
    # Line breaks of the text itself would move what is below; scripts without spaces break anywhere.
    for word in " ".join(text[:_MAX_CHARACTERS].split()).split(" "):
        grown = f"{lines[-1]} {word}".strip()
        if draw.textlength(grown, font=face) <= width or not lines[-1]:
            lines[-1] = grown
        else:
            lines.append(word)
    fitting = [_cut(draw, line, face, width) for line in lines[:max_lines]]
    if len(lines) > max_lines:
        fitting[-1] = _cut(draw, fitting[-1] + " …", face, width)
    for number, line in enumerate(fitting):
        draw.text((place[0], place[1] + number * round(1.25 * face.size)), line, font=face, fill=colour)


def _cut(draw: ImageDraw.ImageDraw, line: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    if draw.textlength(line, font=face) <= width:
        return line
    while line and draw.textlength(line + "…", font=face) > width:
        line = line[:-1]
    return line.rstrip(" …") + "…"
