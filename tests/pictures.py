"""What a reader would stumble over in a picture: words on words, and words that are cut off."""

from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved from now on, instead of their files."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def unreadable(figure: Figure) -> list[str]:
    FigureCanvasAgg(figure).draw()
    texts = [*figure.texts, *(text for axes in figure.axes if axes.get_visible() for text in words(axes))]
    boxes = [(t.get_text(), Text.get_window_extent(t)) for t in texts]  # of an annotation without its arrow
    edge = figure.bbox
    wrong = [
        f"{name!r} is cut off"
        for name, box in boxes
        if box.x0 < edge.x0 - 1 or box.y0 < edge.y0 - 1 or box.x1 > edge.x1 + 1 or box.y1 > edge.y1 + 1
    ]
    for (one, a), (other, b) in combinations(boxes, 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if wide > 2 and high > 2:  # boxes are a little larger than their letters
            wrong.append(f"{one!r} and {other!r} overlap")
    return wrong


def words(axes: Axes) -> list[Text]:
    """What the axes show; a tick that lies outside of them has a label, too."""
    outside = []
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = (*axis.get_major_ticks(), *axis.get_minor_ticks())
        outside += [tick.label1 for tick in ticks if not low <= tick.get_loc() <= high]
    found = axes.findobj(lambda artist: isinstance(artist, Text) and artist.get_text().strip())
    return [text for text in found if text.get_visible() and not any(text is label for label in outside)]
