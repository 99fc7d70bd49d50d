"""What a reader would stumble over in a picture: words on words, and words that are cut off."""

from itertools import combinations

from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved from now on, instead of their files."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def shown_texts(figure: Figure) -> list[Text]:
    """Every text that is drawn; a tick that lies outside of its axis has a label, too."""
    hidden: set[Text] = set()
    for axes in figure.axes:
        if not axes.get_visible():
            hidden.update(axes.findobj(Text))
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            outside = [tick for tick in axis.findobj(Tick) if not low <= tick.get_loc() <= high]
            hidden.update(label for tick in outside for label in (tick.label1, tick.label2))
    texts = [text for text in figure.findobj(Text) if text not in hidden]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def unreadable(figure: Figure) -> list[str]:
    FigureCanvasAgg(figure).draw()
    # Of an annotation without its arrow.
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in shown_texts(figure)]
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
