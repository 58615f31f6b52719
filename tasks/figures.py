"""Pictures of thinking: small functions, arrays in and a Matplotlib figure out. Nothing here knows a model or a task.

Letters are those of `ctm.modules`, and N samples, K classes. Every figure is 8.3 inches wide, which is a page's width,
and its colours (Okabe and Ito's, cividis, magma, red to blue) survive colour blindness. No display is needed.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#8C8C8C",
)  # fmt: skip
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
START, GOAL, WALL = VERMILLION, GREEN, "#2B2B2B"
VEIL = LinearSegmentedColormap.from_list("veil", [(0.42, 0.08, 0.55, 0.0), (0.42, 0.08, 0.55, 0.95)])
"""Transparent to purple: laid over a picture."""
WIDTH = 8.3
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "image.interpolation": "nearest",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}


class Moving(NamedTuple):
    """A figure that changes from tick to tick. What `to` changes in it is marked `animated`."""

    figure: Figure
    to: Callable[[int], object]
    """Puts it at a tick, counted from 0."""
    ticks: int


class Picture(NamedTuple):
    """Something to look at: what it is called, how it is to be read, and a function that draws it."""

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure | Moving]


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def render(figure: Figure, dpi: int) -> Image.Image:
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with rc_context(STYLE):
        canvas.draw()
    return pixels_of(canvas)


def pixels_of(canvas: FigureCanvasAgg) -> Image.Image:
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def frames(moving: Moving, dpi: int = 100) -> list[Image.Image]:
    """One picture a tick, of few colours. What stays is drawn once, what moves (`animated`) over it at every tick."""
    figure, drawn = moving.figure, []
    render(figure, dpi)
    canvas, still = figure.canvas, figure.canvas.copy_from_bbox(figure.bbox)
    artists = sorted(figure.findobj(lambda artist: artist.get_animated()), key=lambda artist: artist.get_zorder())
    for tick in range(moving.ticks):
        canvas.restore_region(still)
        moving.to(tick)
        for artist in artists:
            figure.draw_artist(artist)
        drawn.append(pixels_of(canvas).quantize(192, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE))
    return drawn


def write_gif(images: list[Image.Image], path: Path, seconds: float = 8.0, hold: float = 2.5) -> Path:
    """An endless animation of about `seconds`; the last image stays for `hold`."""
    each = min(500, max(60, int(1000 * seconds / len(images))))
    durations = [each] * (len(images) - 1) + [int(1000 * hold)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
    return path


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()


class Written(NamedTuple):
    """A picture on the disk, and its images: one, or one a tick."""

    picture: Picture
    path: Path
    images: list[Image.Image]


def write(picture: Picture, folder: Path) -> Written:
    """Draws a picture into a folder: NAME.png, or NAME.gif if it moves."""
    drawn = picture.draw()
    if isinstance(drawn, Moving):
        images = frames(drawn)
        return Written(picture, write_gif(images, folder / f"{picture.name}.gif"), images)
    image = render(drawn, 160)
    path = folder / f"{picture.name}.png"
    path.write_bytes(png(image))
    return Written(picture, path, [image])


# ----------------------------------------------------------------------------------------------------------------------
# Parts of figures


def styled(draw: Callable) -> Callable:
    @wraps(draw)
    def inside(*args, **kwargs):
        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def page(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")


def bare(axes: Axes) -> Axes:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def whole_ticks(axes: Axes, n: int, label: str = "tick") -> None:
    axes.set(xlim=(0.5, n + 0.5), xlabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def smooth(rows: int) -> str:
    """How to draw so many rows: more than there are pixels must not be skipped."""
    return "nearest" if rows <= 400 else "antialiased"


def map_of(weights_S: np.ndarray) -> np.ndarray:
    """Weights of tokens as the square map that they were."""
    side = round(len(weights_S) ** 0.5)
    return weights_S.reshape(side, -1)


def draw_certainty(
    axes: Axes, certainty_T: np.ndarray, answer: int, first: int = 0, moves: bool = True
) -> Callable[[int], object]:
    """Certainty so far, the rest of it faint, the answer marked. Ticks begin after `first` others."""
    ticks = first + np.arange(1, len(certainty_T) + 1)
    axes.plot(ticks, certainty_T, color=BLUE, alpha=0.25, marker="." if len(ticks) < 16 else None)
    (line,) = axes.plot([], [], color=BLUE, lw=2, marker="." if len(ticks) < 16 else None, animated=moves)
    axes.plot(
        ticks[answer],
        certainty_T[answer],
        "o",
        ms=9,
        mfc="none",
        mec=VERMILLION,
        mew=1.8,
        clip_on=False,
        label="answer",
    )
    now = axes.axvline(ticks[-1], color=GREY, lw=0.8, animated=True)
    axes.set(ylim=(-0.04, 1.04), ylabel="certainty (0 to 1)", title="How certain it is")
    whole_ticks(axes, int(ticks[-1]))
    axes.legend(loc="lower right" if certainty_T[-1] > 0.5 else "upper right")

    def to(tick: int) -> None:
        line.set_data(ticks[: tick + 1], certainty_T[: tick + 1])
        now.set_xdata([ticks[tick]] * 2)

    to(len(ticks) - 1)
    return to


def draw_attention(
    mean: Axes, heads: Sequence[Axes], attention_THS: np.ndarray, extent, under: Callable[[Axes], object]
) -> Callable[[int], object]:
    """Where all heads together look, and each of the first ones, over what `under` draws; one scale for all ticks."""
    means_TS = attention_THS.mean(1)
    shown = [(axes, attention_THS[:, i], f"head {i + 1}") for i, axes in enumerate(heads)]
    least = 4 / attention_THS.shape[-1]  # to look everywhere alike is faint
    top = max(float(np.quantile(attention_THS[:, : max(1, len(heads))], 0.998)), least)
    images = []
    for axes, weights_TS, title in [(mean, means_TS, None), *shown]:
        under(axes)
        limit = max(float(means_TS.max()), least) if axes is mean else top
        how = {"interpolation": "bilinear" if axes is mean else "nearest", "vmin": 0, "vmax": limit}
        image = axes.imshow(map_of(weights_TS[-1]), cmap=VEIL, extent=extent, animated=True, **how)
        images.append((image, weights_TS))
        if title:
            axes.set_title(title, fontsize=8, loc="center", pad=2)
        bare(axes)
    bar = mean.figure.colorbar(images[0][0], ax=mean, shrink=0.75, pad=0.02, aspect=25)
    bar.ax.tick_params(labelsize=7.5, length=2)
    bar.set_label("attention weight", fontsize=8)
    bar.outline.set_visible(False)

    def to(tick: int) -> None:
        for image, weights_TS in images:
            image.set_data(map_of(weights_TS[tick]))

    return to


def scene(
    widths: Sequence[float], attention_THS: np.ndarray | None, size: float = 3.0
) -> tuple[Figure, list[Axes], list[Axes]]:
    """A row of views of some relative widths above a row of heads."""
    heads = 0 if attention_THS is None else min(8, attention_THS.shape[1])
    below = 0.35 + WIDTH / 8.6 if heads else 0.0
    figure = page(size + below)
    if not heads:
        return figure, list(figure.subplots(1, len(widths), width_ratios=widths)), []
    above, row = figure.subfigures(2, 1, height_ratios=[size, below])
    n = attention_THS.shape[1]
    many = f" (the first {heads} of {n} heads)" if n > heads else ""
    row.suptitle(f"Where each head looks{many}", fontsize=9.5, x=0.012, ha="left")
    small = list(row.subplots(1, max(8, heads)))
    for axes in small[heads:]:
        axes.set_visible(False)
    return figure, list(above.subplots(1, len(widths), width_ratios=widths)), small[:heads]


def share_with_interval(right: np.ndarray) -> tuple[float, float, float]:
    """A share and its 95 % interval (Wilson's)."""
    n, share, z = len(right), float(np.mean(right)), 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return share, middle - half, middle + half


# ----------------------------------------------------------------------------------------------------------------------
# A sample being solved


@styled
def maze(
    walls: np.ndarray,
    start: tuple[int, int],
    goal: tuple[int, int],
    right: list[tuple[int, int]],
    routes: list[list[tuple[int, int]]],
    certainty_T: np.ndarray,
    answer: int,
    attention_THS: np.ndarray | None = None,
) -> Moving:
    """The route as it stands at every tick, where attention looks, and certainty.

    Args:
        walls: (n, n) bool.
        right: places of the route that is right, start included.
        routes: places of the predicted route, for each tick.
    """
    n = len(walls)
    extent = (-0.5, n - 0.5, n - 0.5, -0.5)
    figure, views, heads = scene((3, 3) if attention_THS is None else (3, 3.5, 2.5), attention_THS)
    left, chart = views[0], views[-1]

    def ends(axes: Axes, size: float) -> None:  # animated: above what moves
        axes.plot(start[1], start[0], "o", color=START, ms=size, mec="white", mew=0.6, zorder=3, animated=True)
        axes.plot(goal[1], goal[0], "*", color=GOAL, ms=1.6 * size, mec="white", mew=0.6, zorder=3, animated=True)

    def under(axes: Axes, small: bool) -> None:
        axes.imshow(np.where(walls, 0.72, 1.0), cmap="gray", vmin=0, vmax=1, extent=extent)
        ends(axes, 3 if small else 7)

    side = 72 * 2.4 / n  # points a place
    left.imshow(np.where(walls, 0.17, 1.0), cmap="gray", vmin=0, vmax=1, extent=extent)
    left.plot(*np.array(right).T[::-1], color=GREY, lw=1, ls=(0, (2, 2)))
    (line,) = left.plot([], [], color=BLUE, lw=max(2.0, side / 4), solid_joinstyle="round", animated=True)
    (head,) = left.plot([], [], "o", color=BLUE, ms=max(3.5, side / 2.4), animated=True)
    ends(left, max(4.5, side / 2))
    bare(left)
    title = left.set_title("Route", animated=True)
    move_certainty = draw_certainty(chart, certainty_T, answer)
    look = None
    if attention_THS is not None:
        views[1].set_title("Where it looks (mean of heads)")
        look = draw_attention(views[1], heads, attention_THS, extent, lambda axes: under(axes, axes is not views[1]))

    def to(tick: int) -> None:
        places = np.array(routes[tick])
        line.set_data(places[:, 1], places[:, 0])
        head.set_data(places[-1:, 1], places[-1:, 0])
        note = ": the answer" if tick == answer else ""
        title.set_text(f"Route at tick {tick + 1} of {len(routes)}{note}")
        move_certainty(tick)
        if look:
            look(tick)

    to(len(routes) - 1)
    return Moving(figure, to, len(routes))


@styled
def image(
    pixels: np.ndarray,
    names: Sequence[str],
    target: int,
    probabilities_TK: np.ndarray,
    certainty_T: np.ndarray,
    answer: int,
    attention_THS: np.ndarray | None = None,
) -> Moving:
    """Attention over a picture, and the probabilities of the classes.

    Args:
        pixels: (H, W, 3) in [0, 1].
    """
    height, width = pixels.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    figure, views, heads = scene((2, 2, 2) if attention_THS is None else (2, 2.5, 2, 2), attention_THS, 2.5)
    picture, bars, chart = views[0], views[-2], views[-1]
    picture.imshow(pixels, extent=extent)
    title = bare(picture).set_title("Tick", animated=True)
    shown = np.argsort(-probabilities_TK.max(0), kind="stable")[:10]  # the classes that were ever likely
    shown = np.sort(shown if target in shown else np.append(shown[:9], target))
    marks = [f"{names[k][:12]}{' (right)' if k == target else ''}" for k in shown]
    colours = [ORANGE if k == target else BLUE for k in shown]
    rows = bars.barh(range(len(shown)), probabilities_TK[-1, shown], color=colours, animated=True)
    bars.set(xlim=(0, 1), xlabel="probability", title="What it says", yticks=range(len(shown)))
    bars.set_yticklabels(marks, fontsize=7.5)
    bars.invert_yaxis()
    move_certainty = draw_certainty(chart, certainty_T, answer)
    look = None
    if attention_THS is not None:
        views[1].set_title("Where it looks")
        faint = 0.55 + 0.45 * pixels.mean(-1)
        under = partial(Axes.imshow, X=faint, cmap="gray", vmin=0, vmax=1, extent=extent)
        look = draw_attention(views[1], heads, attention_THS, extent, under)

    def to(tick: int) -> None:
        for row, value in zip(rows, probabilities_TK[tick, shown], strict=True):
            row.set_width(value)
        title.set_text(f"Tick {tick + 1} of {len(probabilities_TK)}{': answer' if tick == answer else ''}")
        move_certainty(tick)
        if look:
            look(tick)

    to(len(probabilities_TK) - 1)
    return Moving(figure, to, len(probabilities_TK))


@styled
def parity(
    negative_L: np.ndarray,
    target_L: np.ndarray,
    odd_TL: np.ndarray,
    certainty_T: np.ndarray,
    answer: int,
    attention_THS: np.ndarray | None = None,
) -> Figure:
    """Which bits are attended to when, and what is said of each place, from tick to tick.

    Args:
        odd_TL: probability of odd parity, at every place.
        attention_THS: one token a bit.
    """
    ticks, length = odd_TL.shape
    heads = 0 if attention_THS is None else min(8, attention_THS.shape[1])
    rows = -(-heads // 4)
    figure = page(3.6 + 1.55 * rows)
    parts = figure.subfigures(1 + bool(rows), 1, height_ratios=[3.6, 1.55 * rows] if rows else None, squeeze=False)[
        :, 0
    ]
    columns = 3 if heads else 2
    grid = parts[0].subplots(
        2, columns, sharex="col", height_ratios=[1, 7 if length < 40 else 9], width_ratios=[3] * (columns - 1) + [2]
    )
    extent = (0.5, length + 0.5, ticks + 0.5, 0.5)

    def strip(axes: Axes, values: np.ndarray, title: str) -> None:
        axes.imshow(values[None], cmap="cividis", vmin=0, vmax=1, aspect="auto", extent=(0.5, length + 0.5, 0, 1))
        axes.set(yticks=[], title=title)
        axes.tick_params(bottom=False)

    def heat(axes: Axes, values: np.ndarray, cmap: str, limits: tuple, label: str | None) -> None:
        drawn = axes.imshow(values, aspect="auto", extent=extent, cmap=cmap, vmin=limits[0], vmax=limits[1])
        axes.axhline(answer + 1, color="white", lw=0.8, ls="--")
        axes.set(xlabel="place in the sequence")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        if label:
            axes.figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.8, aspect=30, label=label)

    if heads:
        strip(grid[0, 0], negative_L, "Bits: bright where the sign flips")
        mean = attention_THS.mean(1)
        heat(grid[1, 0], mean, "magma", (0, mean.max()), "attention weight, mean of heads")
        grid[1, 0].set_ylabel("tick")
    strip(grid[0, -2], target_L, "Right parity: bright where odd")
    heat(grid[1, -2], odd_TL, "cividis", (0, 1), "said: probability of odd")
    if not heads:
        grid[1, -2].set_ylabel("tick")
    grid[0, -1].set_visible(False)
    chart, right = grid[1, -1], ((odd_TL > 0.5) == target_L).mean(1)
    line = {"marker": "."} if ticks < 16 else {}
    chart.plot(certainty_T, np.arange(1, ticks + 1), color=BLUE, label="certainty", **line)
    chart.plot(right, np.arange(1, ticks + 1), color=ORANGE, label="share right", **line)
    chart.axhline(answer + 1, color=GREY, lw=0.8, ls="--", label="answer")
    chart.set(ylim=(ticks + 0.5, 0.5), xlim=(-0.04, 1.04), xlabel="0 to 1", ylabel="tick")
    chart.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    chart.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0)).set_in_layout(False)
    if rows:
        small = parts[1].subplots(rows, 4, sharex=True, sharey=True, squeeze=False)
        for i, axes in enumerate(small.flat):
            if i >= heads:
                axes.set_visible(False)
                continue
            heat(axes, attention_THS[:, i], "magma", (0, float(np.quantile(attention_THS, 0.998))), None)
            axes.set_title(f"head {i + 1}", fontsize=8, loc="center", pad=2)
            axes.set(xlabel="place" if i // 4 == rows - 1 else None, ylabel="tick" if i % 4 == 0 else None)
    return figure


@styled
def sorting(numbers_N: np.ndarray, order_N: np.ndarray, probabilities_TK: np.ndarray) -> Figure:
    """What is said when: the numbers in their right order from below, and the probability of each at every tick."""
    ticks, n = len(probabilities_TK), len(numbers_N)
    figure = page(1.6 + min(3.2, 0.16 * n + 1.2))
    bars, heat = figure.subplots(1, 2, sharey=True, width_ratios=[1, 4])
    bars.barh(range(n), numbers_N[order_N], color=BLUE)
    bars.axvline(0, color="#555555", lw=0.8)
    bars.set(xlabel="number", ylabel="rank (smallest below), the blank on top", title="Numbers, sorted")
    bars.set_yticks([*range(n), n], [*map(str, range(1, n + 1)), "blank"])
    if n > 15:
        bars.set_yticks([0, n // 2, n - 1, n], ["1", str(n // 2 + 1), str(n), "blank"])
    ranked = probabilities_TK[:, [*order_N, n]].T
    drawn = heat.imshow(
        ranked, aspect="auto", origin="lower", extent=(0.5, ticks + 0.5, -0.5, n + 0.5), cmap="cividis", vmin=0, vmax=1
    )
    heat.set(title="What is said at each tick: a staircase is right")
    whole_ticks(heat, ticks)
    figure.colorbar(drawn, ax=heat, label="probability")
    return figure


@styled
def question(
    digits: np.ndarray,
    words: str,
    target: int,
    probabilities_TK: np.ndarray,
    certainty_T: np.ndarray,
    answer: int,
    first: int,
    attention_NHS: np.ndarray | None = None,
) -> Figure:
    """Digits, where each was looked at, the question, and what is answered.

    Args:
        digits: (N, H, W) in [0, 1].
        first: ticks before an answer is due.
        attention_NHS: attention, mean over the ticks at which each digit was shown.
    """
    n = len(digits)
    rows = 1 if attention_NHS is None else 2
    figure = page(1.1 * rows + 2.6)
    above, below = figure.subfigures(2, 1, height_ratios=[1.1 * rows, 2.6])
    grid = above.subplots(rows, max(6, n), squeeze=False)
    for column in range(grid.shape[1]):
        for row in range(rows):
            axes = bare(grid[row, column])
            if column >= n:
                axes.set_visible(False)
                continue
            faint = 0.55 + 0.45 * digits[column] if row else digits[column]
            axes.imshow(faint, cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0))
            if row == 1:
                weights = map_of(attention_NHS[column].mean(0))
                axes.imshow(weights, cmap=VEIL, vmin=0, extent=(0, 1, 1, 0), interpolation="bilinear")
            axes.set_title(f"digit d{column}" if row == 0 else "attention", fontsize=8, loc="center", pad=2)
    heat, chart = below.subplots(1, 2, width_ratios=[3, 2])
    ticks = len(probabilities_TK)
    drawn = heat.imshow(
        probabilities_TK.T, aspect="auto", cmap="cividis", vmin=0, vmax=1, origin="lower",
        extent=(first + 0.5, first + ticks + 0.5, -0.5, probabilities_TK.shape[1] - 0.5),
    )  # fmt: skip
    heat.axhline(target, color=ORANGE, lw=1, ls="--")
    heat.set(title=f"{words} = {target} (dashed)", ylabel="answer", xlabel="tick", yticks=range(0, 10, 2))
    heat.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.colorbar(drawn, ax=heat, label="probability")
    draw_certainty(chart, certainty_T, answer, first, moves=False)
    chart.set_xlim(first + 0.5, first + ticks + 0.5)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Neurons


def spread(values_TD: np.ndarray, n: int) -> np.ndarray:
    """n neurons, from the most to the least lively."""
    ranked = np.argsort(-values_TD.std(0), kind="stable")
    return ranked[np.linspace(0, len(ranked) - 1, min(n, len(ranked))).round().astype(int)]


@styled
def traces(pre_TD: np.ndarray | None, post_TD: np.ndarray, rows: int = 7, columns: int = 8) -> Figure:
    """Activity of many neurons over ticks, each scaled to its own range; from the most lively to the least."""
    chosen = spread(post_TD, rows * columns)
    ticks = len(post_TD)
    figure = page(5.6)
    axes = bare(figure.add_subplot())
    x = np.linspace(0, 0.86, ticks)
    place = [(i % columns, -(i // columns)) for i in range(len(chosen))]
    kinds = [
        ("pre-activation (what the synapses send)", pre_TD, ORANGE),
        ("post-activation (its answer)", post_TD, BLUE),
    ]
    for label, values_TD, colour in kinds:
        if values_TD is None:
            continue
        lines = []
        for neuron, (column, row) in zip(chosen, place, strict=True):
            trace = values_TD[:, neuron]
            span = max(float(np.ptp(trace)), 1e-9)
            lines.append(np.stack([column + x, row + 0.62 * (trace - trace.min()) / span], axis=-1))
        axes.add_collection(LineCollection(lines, colors=colour, lw=1.1 if ticks > 12 else 1.4, label=label))
    for neuron, (column, row) in zip(chosen, place, strict=True):
        axes.text(column, row + 0.68, f"{neuron}", fontsize=7.5, color="#444444", weight="bold")
        axes.text(column + 0.86, row + 0.68, f"{np.ptp(post_TD[:, neuron]):.2g}", fontsize=7.5, color=BLUE, ha="right")
    used = -(-len(chosen) // columns)
    axes.set(xlim=(-0.05, columns - 0.09), ylim=(-used + 0.72, 1.02))
    axes.set_title(
        f"{len(chosen)} of {post_TD.shape[1]} neurons over {ticks} ticks; their number, and the post-activation's range"
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2)
    return figure


def plane(features_FD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neurons in the plane by their activity (F features of D neurons): the first two principal components (D, 2), and
    the share of the variance that each explains."""
    z_DF = (features_FD - features_FD.mean(0)).T
    z_DF = z_DF / np.maximum(z_DF.std(1, keepdims=True), 1e-9)
    z_DF = z_DF - z_DF.mean(0)
    u, s, _ = np.linalg.svd(z_DF, full_matrices=False)
    signs = np.sign(u[np.abs(u[:, :2]).argmax(0), [0, 1]])  # the same picture on every machine
    return u[:, :2] * s[:2] * signs, s[:2] ** 2 / max(float((s**2).sum()), 1e-12)


@styled
def neurons(place_D2: np.ndarray, explained: np.ndarray, post_TD: np.ndarray) -> Moving:
    """Neurons laid out by what they do together, lit by what they do now; and all of them over all ticks."""
    ticks, n = post_TD.shape
    limit = max(float(np.quantile(np.abs(post_TD), 0.95)), 1e-9)  # a few are far above the others
    figure = page(3.9)
    left, right = figure.subplots(1, 2, width_ratios=[5, 4])
    order = np.argsort(np.abs(post_TD).max(0))  # the liveliest are drawn last
    size = float(np.clip(9000 / n, 5, 60))
    how = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    points = left.scatter(
        *place_D2[order].T, s=size, c=post_TD[-1, order], edgecolors="#777777", linewidths=0.3, animated=True, **how
    )
    left.set(xlabel=f"PC 1 ({explained[0]:.0%} of variance)", ylabel=f"PC 2 ({explained[1]:.0%} of variance)")
    left.set(xticks=[], yticks=[])
    title = left.set_title("Neurons", animated=True)
    rows = np.argsort(np.arctan2(*place_D2.T[::-1]))  # neighbours in the plane are neighbours here
    right.imshow(post_TD.T[rows], aspect="auto", extent=(0.5, ticks + 0.5, n, 0), interpolation=smooth(n), **how)
    now = right.axvline(ticks, color="black", lw=1.2, animated=True)
    right.set(ylabel="neuron, by its angle on the left", title="All ticks")
    whole_ticks(right, ticks)
    figure.colorbar(points, ax=right, label="post-activation", shrink=0.9, extend="both")

    def to(tick: int) -> None:
        points.set_array(post_TD[tick, order])
        now.set_xdata([tick + 1] * 2)
        title.set_text(f"{n} neurons by PCA of their activity, tick {tick + 1} of {ticks}")

    to(ticks - 1)
    return Moving(figure, to, ticks)


def matrix(values_R: np.ndarray, mirrored: bool) -> np.ndarray | None:
    """Values of all pairs i <= j of n neurons as an (n, n) matrix; None where it is not all of them."""
    n = int(((8 * len(values_R) + 1) ** 0.5 - 1) / 2)
    if n * (n + 1) // 2 != len(values_R):
        return None
    square = np.full((n, n), np.nan)
    i, j = np.triu_indices(n)
    square[i, j] = values_R
    if mirrored:
        square[j, i] = values_R
    return square


@styled
def synchronization(kinds: dict[str, tuple[np.ndarray, str]], answer: int) -> Figure:
    """How pairs of neurons move together, from tick to tick.

    Args:
        kinds: by what it is for, synchronization (T, R) and its pairing. Where all pairs of some neurons are taken,
            also as a matrix, at three ticks.
        answer: the tick of the answer, from 0.
    """
    figure = page(2.75 * len(kinds))
    for part, (name, (values_TR, pairing)) in zip(
        figure.subfigures(len(kinds), 1, squeeze=False)[:, 0], kinds.items(), strict=True
    ):
        ticks, n = values_TR.shape
        limit = max(float(np.quantile(np.abs(values_TR), 0.99)), 1e-9)
        how = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        at = sorted({0, answer, ticks - 1} if answer not in (0, ticks - 1) else {0, ticks // 2, ticks - 1})
        square = pairing != "random" and matrix(values_TR[0], True) is not None
        panels = part.subplots(
            1, 1 + (len(at) if square else 0), squeeze=False, width_ratios=[2] + [1] * len(at) * square
        )[0]
        rows = np.argsort(values_TR[answer], kind="stable")
        drawn = panels[0].imshow(
            values_TR.T[rows], aspect="auto", extent=(0.5, ticks + 0.5, n, 0), interpolation=smooth(n), **how
        )
        panels[0].axvline(answer + 1, color="black", lw=0.9, ls="--")
        panels[0].set(ylabel="pair, by its value at the answer")
        whole_ticks(panels[0], ticks)
        part.suptitle(f"Synchronization behind the {name}: {n:,} pairs of neurons", fontsize=9.5, x=0.012, ha="left")
        for axes, tick in zip(panels[1:], at, strict=False):
            axes.imshow(matrix(values_TR[tick], pairing == "dense"), **how)
            axes.set_title(f"tick {tick + 1}", fontsize=8.5, loc="center", pad=3)
            axes.set(xlabel="neuron", xticks=[], yticks=[], ylabel="neuron" if tick == at[0] else None)
        part.colorbar(drawn, ax=list(panels), label="synchronization", shrink=0.9, aspect=25)
    return figure


@styled
def decays(kinds: dict[str, np.ndarray]) -> Figure:
    """Learned decay rates of the pairs: how soon a synchronization forgets."""
    figure = page(2.7)
    top = max(0.1, *(float(values.max()) for values in kinds.values()))
    for axes, (name, values) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        axes.hist(values, bins=np.linspace(0, top, 31), color=BLUE)
        zero = float((values <= 1e-6).mean())
        axes.set(xlabel="decay rate (per tick)", title=f"Behind the {name}: {zero:.0%} of {len(values):,} never forget")
        above = axes.secondary_xaxis("top", functions=(lambda rate: rate, lambda rate: rate))
        marks = [rate for rate in axes.get_xticks() if 0 < rate <= top]
        above.set_xticks(marks, [f"{np.log(2) / rate:.1f}" for rate in marks])
        above.set_xlabel("half-life (ticks)", fontsize=8.5)
        above.tick_params(labelsize=8)
    figure.axes[0].set_ylabel("pairs")
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Many samples


@styled
def over_ticks(metrics: dict[str, dict[str, np.ndarray]], certainty_NT: np.ndarray) -> Figure:
    """Means over samples at every tick, with their 95 % intervals.

    Args:
        metrics: for each a panel: its curves by name, (N, T) each.
    """
    figure = page(3.5)
    row = figure.subplots(1, max(1, len(metrics)), sharey=True, squeeze=False)[0]

    def draw(axes: Axes, values_NT: np.ndarray, **style) -> None:
        mean, ticks = values_NT.mean(0), np.arange(1, values_NT.shape[1] + 1)
        marks = {"marker": "o", "ms": 3.5} if len(mean) < 16 else {}
        axes.plot(ticks, mean, lw=1.7, **style, **marks)
        if len(values_NT) > 1:
            half = 1.96 * values_NT.std(0, ddof=1) / len(values_NT) ** 0.5
            axes.fill_between(ticks, mean - half, mean + half, color=style["color"], alpha=0.13, lw=0)

    for axes, (metric, curves) in zip(row, (metrics or {"certainty": {}}).items(), strict=True):
        for (name, values_NT), colour in zip(curves.items(), CYCLE, strict=False):
            draw(axes, values_NT, color=colour, label=name)
        draw(axes, certainty_NT, color="#555555", ls=":", label="certainty")
        whole_ticks(axes, certainty_NT.shape[1])
        axes.set(ylim=(-0.02, 1.02), title=metric)
        axes.grid(axis="y", color="#EEEEEE")
    row[0].set_ylabel("mean over samples, 95 % band")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


@styled
def positions(right_TP: np.ndarray, label: str) -> Figure:
    """How often each position of the answer is right at each tick."""
    figure = page(3.4)
    axes = figure.add_subplot()
    extent = (0.5, len(right_TP) + 0.5, 0.5, right_TP.shape[1] + 0.5)
    drawn = axes.imshow(right_TP.T, aspect="auto", origin="lower", extent=extent, cmap="cividis", vmin=0, vmax=1)
    whole_ticks(axes, len(right_TP))
    axes.set(ylabel=label)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.colorbar(drawn, label="share of samples right")
    return figure


@styled
def calibration(ways: dict[str, tuple[np.ndarray, np.ndarray]], bins: int = 15) -> Figure:
    """How often predictions of a confidence are right: name -> confidence (N,) and whether right (N,)."""
    figure = page(4.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="perfectly calibrated")
    edges = np.linspace(0, 1, bins + 1)
    for i, ((name, (confidence, right)), colour, mark) in enumerate(zip(ways.items(), CYCLE, "osD", strict=False)):
        which = np.digitize(confidence, edges[1:-1], right=True)
        counts = np.bincount(which, minlength=bins)
        full = counts > 0
        sums = [np.bincount(which, weights=values, minlength=bins)[full] for values in (confidence, right)]
        sure, share = (total / counts[full] for total in sums)
        error = float((counts[full] * np.abs(sure - share)).sum() / counts.sum())
        above.plot(sure, share, marker=mark, ms=4.5, color=colour, lw=1.4, label=f"{name}: error {error:.1%}")
        wide = 1 / bins / len(ways)
        below.bar(edges[:-1] + wide * (i + 0.5), counts / counts.sum(), width=0.9 * wide, color=colour)
    above.set(ylim=(-0.02, 1.02), ylabel="share right")
    above.legend(loc="upper left")
    above.grid(color="#EEEEEE")
    below.set(xlim=(0, 1), xlabel="probability of the predicted class", ylabel="share of\npredictions")
    below.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


@styled
def thinking_time(tick_N: np.ndarray, right_N: np.ndarray, ticks: int, solved: str) -> Figure:
    """When the answer was given: a histogram over ticks, right and wrong answers stacked."""
    figure = page(2.9)
    axes = figure.add_subplot()
    edges = np.arange(0.5, ticks + 1) if ticks <= 60 else np.linspace(0.5, ticks + 0.5, 61)
    groups = [tick_N[right_N > 0.5], tick_N[right_N <= 0.5]]
    labels = [f"{solved} ({len(groups[0])})", f"not {solved} ({len(groups[1])})"]
    axes.hist(groups, bins=edges, stacked=True, color=[BLUE, ORANGE], label=labels, rwidth=0.92)
    axes.axvline(tick_N.mean(), color="#333333", lw=1, ls="--", label=f"mean, {tick_N.mean():.1f} ticks")
    whole_ticks(axes, ticks, "tick of the answer")
    axes.set(ylabel="samples")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@styled
def by_difficulty(
    difficulty_N: np.ndarray, tick_N: np.ndarray, right_N: np.ndarray, ticks: int, label: str, solved: str
) -> Figure:
    """Success and thinking time against how hard a sample is, with 95 % intervals."""
    figure = page(3.1)
    left, right = figure.subplots(1, 2)
    values = np.unique(difficulty_N)
    groups = [difficulty_N == value for value in values]
    shares = np.array([share_with_interval(right_N[group]) for group in groups])
    left.errorbar(
        values, shares[:, 0], yerr=abs(shares[:, 1:] - shares[:, :1]).T, fmt="o-", color=BLUE, capsize=2, ms=4
    )
    left.set(xlabel=label, ylabel=f"share {solved}", ylim=(-0.03, 1.03), title="Success")
    means = np.array([tick_N[group].mean() for group in groups])
    halves = np.array([1.96 * tick_N[g].std(ddof=1) / g.sum() ** 0.5 if g.sum() > 1 else np.nan for g in groups])
    rng = np.random.default_rng(0)
    step = np.diff(values).min() if len(values) > 1 else 1
    jitter = rng.uniform(-0.25, 0.25, len(tick_N)) * step
    right.plot(difficulty_N + jitter, tick_N + rng.uniform(-0.2, 0.2, len(tick_N)), ".", color=SKY, ms=3, alpha=0.6)
    right.errorbar(values, means, yerr=halves, fmt="o-", color=BLUE, capsize=2, ms=4, label="mean")
    right.plot([], [], ".", color=SKY, label="a sample")
    right.set(xlabel=label, ylabel="tick of the answer", ylim=(0.2, ticks + 0.8), title="Thinking time")
    right.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    right.legend(loc="best")
    for axes in (left, right):
        axes.set_xlim(values[0] - step / 2, values[-1] + step / 2)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
        axes.grid(axis="y", color="#EEEEEE")
    return figure


@styled
def reapplication(sets: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], trained: int) -> Figure:
    """Mazes reached at one look and by going on from where the route ended, against the length of the route.

    Args:
        sets: name -> length of the shortest route (N,), reached at once (N,), reached by going on (N,).
        trained: moves that one look can predict.
    """
    figure = page(3.2)
    row = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for axes, (name, (length, once, again)) in zip(row, sets.items(), strict=True):
        edges = np.unique(np.quantile(length, np.linspace(0, 1, 7)).round())
        which = np.clip(np.digitize(length, edges[1:-1], right=True), 0, max(0, len(edges) - 2))
        for label, right, colour, mark in (("one look", once, BLUE, "o"), ("re-applied", again, ORANGE, "s")):
            groups = [which == i for i in np.unique(which)]
            x = np.array([length[group].mean() for group in groups])
            x = x + (0.004 if colour == BLUE else -0.004) * max(trained, length.max())  # beside each other
            shares = np.array([share_with_interval(right[group]) for group in groups])
            error = abs(shares[:, 1:] - shares[:, :1]).T
            axes.errorbar(x, shares[:, 0], yerr=error, fmt=f"{mark}-", color=colour, capsize=2, ms=4,
                          label=f"{label}: {right.mean():.0%}")  # fmt: skip
        axes.axvline(trained, color=GREY, lw=1, ls="--", label=f"one look's {trained} moves")
        axes.set(xlabel="length of the route (moves)", title=f"{name}, {len(length)} mazes", ylim=(-0.03, 1.03))
        axes.set_xlim(0, max(trained, length.max()) * 1.05)
        axes.grid(axis="y", color="#EEEEEE")
        axes.legend(loc="best")
    row[0].set_ylabel("share reached")
    return figure
