"""One look for all figures: colours that colour-blind readers tell apart, and text that stays text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color universal design" (2008).
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
HEAT = "magma"  # rises evenly in lightness
WIDTH = 6.5  # inches: the text width of most papers
PNG_DPI = 200

SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "image.interpolation": "nearest",
    "svg.fonttype": "none",  # text, which readers can search and copy
    "svg.hashsalt": "looc-ldm",  # one drawing, one file
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Drawing:
    """A figure with its words.

    Attributes:
        name (`str`): Of its files.
        title (`str`): A heading.
        caption (`str`): What is drawn, in plain text.
        figure (`Figure`): The figure.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        """The content of its PNG file."""
        return self._png

    def svg(self) -> bytes:
        """The content of its SVG file. What are dots by the thousand are pixels there too."""
        return self._svg

    # Drawing takes long: the page and the files share it.
    @cached_property
    def _png(self) -> bytes:
        return self._saved("png", dpi=PNG_DPI)

    @cached_property
    def _svg(self) -> bytes:
        return self._saved("svg", dpi=PNG_DPI, metadata={"Date": None})

    def _saved(self, kind: str, **kwargs) -> bytes:
        buffer = io.BytesIO()
        with style():
            self.figure.savefig(buffer, format=kind, **kwargs)
        return buffer.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Figures are made, and saved, in this."""
    import matplotlib.style
    from cycler import cycler

    cycle = {"axes.prop_cycle": cycler(color=[BLUE, RED, GREEN, ORANGE, PURPLE, SKY, "black"])}
    with matplotlib.style.context(["default", {**SETTINGS, **cycle}]):  # whatever the user's own settings are
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, sizes in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    return figure


def grid(axes: Axes, axis: str = "y") -> None:
    axes.grid(True, axis=axis)


def picture(axes: Axes, pixels, **kwargs) -> object:
    """An image without ticks: uint8 (C, H, W), or numbers (H, W) with a colour map."""
    if pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0).numpy()
        pixels = pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels
    drawn = axes.imshow(pixels, **kwargs)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return drawn


def counted(count: int, thing: str) -> str:
    """For instance "1 image", "2,000 images"."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def percent(share: float) -> str:
    """A share for a title, which is 100 % or 0 % only where it is exactly that."""
    if 0.999 <= share < 1:
        return "> 99.9 %"
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.3g} %"
