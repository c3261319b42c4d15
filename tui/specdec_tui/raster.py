"""Screens as pictures: cells drawn one by one, blocks and lines as rectangles, so that they join without seams.

Needs the extra `export`: Pillow, and a font that has every glyph the screens use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.color import Color
from rich.segment import Segment
from textual.screen import Screen
from textual.strip import Strip

from specdec_engine.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = (8, 17)
"""Pixels of a cell."""
_SIZE = 13
_EIGHTHS = "▁▂▃▄▅▆▇█"
_LEFTS = "▏▎▍▌▋▊▉█"
_SHADES = {"░": 0.3, "▒": 0.5, "▓": 0.75}
_BACKGROUND, _FOREGROUND = "#101214", "#D8D8D8"
_LINES = {  # which of left, right, up, down a box character reaches
    "─": "lr", "━": "lr", "│": "ud", "╭": "rd", "╮": "ld", "╰": "ru", "╯": "lu",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shot:
    """A screen as it was drawn, and how long it stands."""

    strips: Sequence[Strip]
    milliseconds: int


def drawn(screen: Screen[Any]) -> list[Strip]:
    """A screen's lines as Textual draws them: the one use of what it keeps to itself."""
    return screen._compositor.render_strips()


def png(screen: Screen[Any]) -> bytes:
    """The screen as it is. Raises UsageError without the extra."""
    from io import BytesIO

    out = BytesIO()
    picture(drawn(screen)).save(out, "PNG")
    return out.getvalue()


def gif(frames: Sequence[Shot]) -> bytes:
    """An animation that repeats. Raises UsageError without the extra."""
    from io import BytesIO

    images = [picture(frame.strips) for frame in frames]
    colours = _palette(images)
    small = [image.quantize(palette=colours, dither=_pillow()[0].Dither.NONE) for image in images]
    out = BytesIO()
    small[0].save(
        out,
        "GIF",
        save_all=True,
        append_images=small[1:],
        duration=[f.milliseconds for f in frames],
        loop=0,
        optimize=False,
    )
    return out.getvalue()


def picture(strips: Sequence[Strip]) -> Image:
    """One screen. Raises UsageError without the extra."""
    image_module, draw_module, _ = _pillow()
    width, height = CELL
    columns = max((strip.cell_length for strip in strips), default=1)
    image: Image = image_module.new("RGB", (columns * width, len(strips) * height), _BACKGROUND)
    canvas = draw_module.Draw(image)
    for row, strip in enumerate(strips):
        column = 0
        for segment in strip:
            column = _segment(canvas, segment, column, row)
    return image


def _segment(canvas: Any, segment: Segment, column: int, row: int) -> int:
    """Draw it; the column after it."""
    width, height = CELL
    style = segment.style
    ink = _hex(None if style is None else style.color) or _FOREGROUND
    paper = _hex(None if style is None else style.bgcolor) or _BACKGROUND
    if style is not None and style.reverse:
        ink, paper = paper, ink
    cells = cell_len(segment.text)
    if not cells:
        return column
    x, y = column * width, row * height
    canvas.rectangle((x, y, x + cells * width - 1, y + height - 1), paper)
    bold, italic = bool(style and style.bold), bool(style and style.italic)
    for char in segment.text:
        _glyph(canvas, char, (x, y), ink, paper, bold=bold or italic)
        x += cell_len(char) * width
    left = column * width
    if style is not None and style.underline:
        canvas.line((left, y + height - 2, x - 1, y + height - 2), ink)
    if style is not None and style.strike:
        canvas.line((left, y + height // 2 + 1, x - 1, y + height // 2 + 1), ink)
    return column + cells


def _hex(color: Color | None) -> str | None:
    return None if color is None or color.triplet is None else color.triplet.hex


def _glyph(canvas: Any, char: str, at: tuple[int, int], ink: str, paper: str, *, bold: bool) -> None:
    (x, y), (width, height) = at, CELL
    if char in " \u00a0":
        return
    if char in _LEFTS:
        canvas.rectangle((x, y, x + round(width * (_LEFTS.index(char) + 1) / 8) - 1, y + height - 1), ink)
    elif char in _EIGHTHS:
        canvas.rectangle(
            (x, y + height - round(height * (_EIGHTHS.index(char) + 1) / 8), x + width - 1, y + height - 1), ink
        )
    elif char in _SHADES:
        canvas.rectangle((x, y, x + width - 1, y + height - 1), _mixed(ink, paper, _SHADES[char]))
    elif char in _LINES:
        middle, centre, thick = x + width // 2, y + height // 2, 1 if char == "━" else 0
        ends = {"l": (x, centre), "r": (x + width - 1, centre), "u": (middle, y), "d": (middle, y + height - 1)}
        for way in _LINES[char]:
            ex, ey = ends[way]
            canvas.rectangle((min(ex, middle), min(ey, centre), max(ex, middle), max(ey, centre) + thick), ink)
    else:
        canvas.text((x, y + 1), char, ink, _font(bold))


def _mixed(ink: str, paper: str, share: float) -> tuple[int, ...]:
    pairs = zip(bytes.fromhex(ink.lstrip("#")), bytes.fromhex(paper.lstrip("#")), strict=True)
    return tuple(round(a * share + b * (1 - share)) for a, b in pairs)


def _palette(images: Sequence[Image]) -> Image:
    """One palette for all frames, from some of them: colours that change between frames would flicker."""
    image_module, _, _ = _pillow()
    some = images[:: max(1, len(images) // 8)]
    width, height = some[0].size
    sheet: Image = image_module.new("RGB", (width, height * len(some)))
    for i, image in enumerate(some):
        sheet.paste(image, (0, i * height))
    return sheet.quantize(128)


@cache
def _font(bold: bool) -> Any:
    _, _, font_module = _pillow()
    path = files("fontpkg_fira_code") / "files" / "FiraCode[wght].ttf"
    font = font_module.truetype(str(path), _SIZE)
    font.set_variation_by_axes([650 if bold else 420])
    return font


def require() -> None:
    """Raises UsageError without the extra."""
    _pillow()


def _pillow() -> tuple[Any, Any, Any]:
    try:
        import fontpkg_fira_code  # noqa: F401
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise UsageError("pictures need the extra `export`", "pip install 'specdec-cli[export]'") from error
    return Image, ImageDraw, ImageFont
