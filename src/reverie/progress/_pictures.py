"""Small pictures in a terminal, as text to be written to it: by a graphics protocol where there is one, else in coloured half blocks.

    kitty     the graphics protocol of kitty, also ghostty's (sw.kovidgoyal.net/kitty/graphics-protocol)
    iterm2    inline images of iTerm2, also WezTerm's (iterm2.com/documentation-images.html)
    sixel     DEC's graphics of 1983, in foot, mlterm, contour and others (VT330/VT340 Programmer Reference, chapter 14)
    blocks    the upper half of a character cell in one colour on another: any terminal of 24-bit colour

Which it is, environment variables tell; nothing is asked of the terminal, whose answer would have to be waited for. Inside tmux and
screen only blocks come through.
"""

import base64
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import UInt8
    from PIL.Image import Image

# Pictures side by side as text, for a terminal of so many columns.
Painter = Callable[["UInt8[np.ndarray, 'count height width 3']", int], str]

# Lines of a strip; a cell is taken for twice as high as wide, and for so many pixels high.
_LINES, _CELL = 8, 16
_COLOURS = 64
# The protocol carries at most so many characters at a time.
_CHUNK = 4096
_SIXEL = {"foot", "foot-extra", "mlterm", "contour", "yaft-256color"}


def choose_painter(environment: Mapping[str, str], *, true_colour: bool) -> Painter | None:
    """How pictures are shown in the terminal that these environment variables describe; None if they cannot be."""
    terminal, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" not in environment and not terminal.startswith(("screen", "tmux")):
        if "KITTY_WINDOW_ID" in environment or "kitty" in terminal or program == "ghostty":
            return kitty
        if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
            return iterm2
        if terminal in _SIXEL or "sixel" in terminal:
            return sixel
    return blocks if true_colour else None


def kitty(pictures: "UInt8[np.ndarray, 'count height width 3']", columns: int) -> str:
    """As PNG, in pieces; the cursor stays, and is moved below by line feeds."""
    data = base64.standard_b64encode(_png(_strip(pictures, columns, _LINES * _CELL, _CELL // 2))).decode()
    pieces = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    text = ""
    for number, piece in enumerate(pieces):
        about = f"a=T,f=100,q=2,C=1,r={_LINES}," if number == 0 else ""
        text += f"\x1b_G{about}m={int(number < len(pieces) - 1)};{piece}\x1b\\"
    return text + "\n" * _LINES


def iterm2(pictures: "UInt8[np.ndarray, 'count height width 3']", columns: int) -> str:
    """As PNG."""
    data = _png(_strip(pictures, columns, _LINES * _CELL, _CELL // 2))
    return f"\x1b]1337;File=inline=1;size={len(data)};height={_LINES};preserveAspectRatio=1:{base64.standard_b64encode(data).decode()}\x07\n"


def sixel(pictures: "UInt8[np.ndarray, 'count height width 3']", columns: int) -> str:
    """In bands of six lines, each drawn colour by colour; runs of equal columns are counted."""
    import numpy as np

    strip = _strip(pictures, columns, _LINES * _CELL, _CELL // 2).quantize(_COLOURS)
    palette = np.array(strip.getpalette(), np.uint16)[: 3 * _COLOURS].reshape(-1, 3) * 100 // 255
    indices = np.asarray(strip)
    indices = np.pad(indices, ((0, -len(indices) % 6), (0, 0)), mode="edge")
    text = "\x1bPq" + "".join(f"#{number};2;{r};{g};{b}" for number, (r, g, b) in enumerate(palette.tolist()))
    for band in np.split(indices, len(indices) // 6):
        rows = []
        for colour in np.unique(band):
            bits = ((band == colour) * (1 << np.arange(6))[:, None]).sum(axis=0)
            starts = np.flatnonzero(np.diff(bits, prepend=-1))
            lengths = np.diff(starts, append=len(bits))
            rows.append(f"#{colour}" + "".join(f"!{n}{chr(63 + bits[at])}" for at, n in zip(starts, lengths, strict=True)))
        text += "$".join(rows) + "-"
    return text + "\x1b\\\n"


def blocks(pictures: "UInt8[np.ndarray, 'count height width 3']", columns: int) -> str:
    """Two pixels in a cell, one above the other."""
    import numpy as np

    pixels = np.asarray(_strip(pictures, columns, 2 * _LINES, 1))
    lines = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        cells = (f"\x1b[38;2;{r};{g};{b};48;2;{x};{y};{z}m\u2580" for (r, g, b), (x, y, z) in zip(upper, lower, strict=True))
        lines.append("".join(cells) + "\x1b[0m\n")
    return "".join(lines)


def _strip(pictures: "UInt8[np.ndarray, 'count height width 3']", columns: int, height: int, cell: int) -> "Image":
    """As many of the pictures side by side as fit, each as high as the strip.

    Args:
        height: Of the strip, in pixels.
        cell: Width of a column of the terminal, in pixels.
    """
    from PIL import Image

    width = max(1, round(height * pictures.shape[2] / pictures.shape[1]))
    gap = cell
    count = max(1, min(len(pictures), (columns * cell + gap) // (width + gap)))
    strip = Image.new("RGB", (count * (width + gap) - gap, height))
    # Enlarged pixels stay pixels; of many, each small one is the mean.
    how = Image.Resampling.NEAREST if height >= pictures.shape[1] else Image.Resampling.BOX
    for place, picture in enumerate(pictures[:count]):
        strip.paste(Image.fromarray(picture).resize((width, height), how), (place * (width + gap), 0))
    return strip


def _png(picture: "Image") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()
