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
"""Pixels of a cell of an animation; of a picture twice as many each way."""
_SIZE = 13
_FINE = 2
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
    picture(drawn(screen), _FINE).save(out, "PNG")
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


def picture(strips: Sequence[Strip], scale: int = 1) -> Image:
    """One screen, with `CELL` times scale pixels a cell. Raises UsageError without the extra."""
    image_module, draw_module, _ = _pillow()
    width, height = CELL[0] * scale, CELL[1] * scale
    columns = max((strip.cell_length for strip in strips), default=1)
    image: Image = image_module.new("RGB", (columns * width, len(strips) * height), _BACKGROUND)
    canvas = _Canvas(draw_module.Draw(image), scale)
    for row, strip in enumerate(strips):
        column = 0
        for segment in strip:
            column = canvas.segment(segment, column, row)
    return image


class _Canvas:
    """Draws cells, so many pixels wide and high."""

    def __init__(self, draw: Any, scale: int) -> None:
        self._draw, self._scale = draw, scale
        self._width, self._height = CELL[0] * scale, CELL[1] * scale

    def segment(self, segment: Segment, column: int, row: int) -> int:
        """Draw it; the column after it."""
        style, scale = segment.style, self._scale
        ink = _hex(None if style is None else style.color) or _FOREGROUND
        paper = _hex(None if style is None else style.bgcolor) or _BACKGROUND
        if style is not None and style.reverse:
            ink, paper = paper, ink
        cells = cell_len(segment.text)
        if not cells:
            return column
        x, y = column * self._width, row * self._height
        self._box(x, y, cells * self._width, self._height, paper)
        bold, italic = bool(style and style.bold), bool(style and style.italic)
        if style is not None and style.dim:
            ink = f"#{bytes(_mixed(ink, paper, 0.6)).hex()}"
        for char in segment.text:
            self._glyph(char, x, y, ink, paper, bold=bold or italic)
            x += cell_len(char) * self._width
        left = column * self._width
        if style is not None and style.underline:
            self._box(left, y + self._height - 2 * scale, x - left, scale, ink)
        if style is not None and style.strike:
            self._box(left, y + self._height // 2 + scale, x - left, scale, ink)
        return column + cells

    def _box(self, x: int, y: int, width: int, height: int, ink: str | tuple[int, ...]) -> None:
        self._draw.rectangle((x, y, x + width - 1, y + height - 1), ink)

    def _glyph(self, char: str, x: int, y: int, ink: str, paper: str, *, bold: bool) -> None:
        width, height, scale = self._width, self._height, self._scale
        if char in " \u00a0":
            return
        if char in _LEFTS:
            self._box(x, y, round(width * (_LEFTS.index(char) + 1) / 8), height, ink)
        elif char in _EIGHTHS:
            high = round(height * (_EIGHTHS.index(char) + 1) / 8)
            self._box(x, y + height - high, width, high, ink)
        elif char in _SHADES:
            self._box(x, y, width, height, _mixed(ink, paper, _SHADES[char]))
        elif char in _LINES:
            middle, centre, thick = x + width // 2, y + height // 2, scale * (2 if char == "━" else 1)
            ends = {"l": (x, centre), "r": (x + width - 1, centre), "u": (middle, y), "d": (middle, y + height - 1)}
            for way in _LINES[char]:
                ex, ey = ends[way]
                left, top = min(ex, middle), min(ey, centre)
                across = way in "lr"
                self._box(
                    left, top, abs(ex - middle) + 1 if across else scale, thick if across else abs(ey - centre) + 1, ink
                )
        else:
            self._draw.text((x, y + scale), char, ink, _font(bold, scale))


def _hex(color: Color | None) -> str | None:
    return None if color is None or color.triplet is None else color.triplet.hex


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
def _font(bold: bool, scale: int) -> Any:
    _, _, font_module = _pillow()
    path = files("fontpkg_fira_code") / "files" / "FiraCode[wght].ttf"
    font = font_module.truetype(str(path), _SIZE * scale)
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
