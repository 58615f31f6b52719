"""Pictures of thinking, drawn from a recording."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from ctm.record import record
from tasks.mazegen import follow

BLUE, GREY = (0, 114, 178), (90, 90, 90)  # from Okabe and Ito's palette
START, GOAL, WALL, FREE = (213, 94, 0), (0, 158, 115), (30, 30, 30), (255, 255, 255)


def write_gif(frames: list[Image.Image], path: Path, milliseconds: int = 400, hold: int = 2500) -> Path:
    """An endless animation; the last frame stays for `hold`."""
    durations = [milliseconds] * (len(frames) - 1) + [hold]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return path


def paint_maze(walls: np.ndarray, start, goal, side: int) -> Image.Image:
    """The maze as a square picture of about `side` pixels."""
    pixels = np.where(walls[..., None], WALL, FREE).astype(np.uint8)
    pixels[tuple(start)], pixels[tuple(goal)] = START, GOAL
    scale = max(1, side // len(walls))
    return Image.fromarray(np.kron(pixels, np.ones((scale, scale, 1), dtype=np.uint8)))


def paint_route(image: Image.Image, places: list[tuple[int, int]], n: int) -> None:
    """A line through the middles of the places."""
    scale = image.width / n
    points = [((column + 0.5) * scale, (row + 0.5) * scale) for row, column in places]
    if len(points) > 1:
        ImageDraw.Draw(image).line(points, fill=BLUE, width=max(2, int(scale / 4)), joint="curve")


def paint_attention(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """Attention (h, w) over the picture, light where it looks, scaled to its own maximum."""
    heat = Image.fromarray((255 * weights / weights.max()).astype(np.uint8)).resize(
        image.size, Image.Resampling.BILINEAR
    )
    strength = np.asarray(heat, dtype=np.float32)[..., None] / 255
    colours = colormaps["inferno"](np.asarray(heat))[..., :3] * 255
    mixed = np.asarray(image) * (1 - 0.75 * strength) * 0.6 + colours * (0.25 + 0.6 * strength) * 0.7
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


@torch.no_grad()
def maze_gif(task, model: nn.Module, path: Path, side: int = 330, among: int = 100) -> Path:
    """A test maze being solved: the route as it is at every tick up to the answer, and where attention looks.

    Takes the longest route that is reached among the first test mazes, or the longest of all where none is.
    """
    mazes = task.dataset("test")
    device = next(model.parameters()).device
    images, routes = (
        torch.from_numpy(np.stack(part))
        for part in zip(*(mazes[i] for i in range(min(among, len(mazes)))), strict=True)
    )
    images, routes = images.to(device), routes.to(device)
    was_training = model.training
    model.eval()
    with record(model) as seen:
        thought = model(images)
    model.train(was_training)
    score = task.metrics(thought, (images, routes))["reached"] * 1000 + (routes != 4).sum(1)
    pick = int(score.argmax())
    maze, answer = mazes.maze(pick), int(thought.certainty[pick].argmax())
    moves = rearrange(thought.predictions[pick], "t (p k) -> t p k", k=5).argmax(-1).tolist()
    n, frames = len(maze.walls), []
    font = ImageFont.load_default(15)
    for tick in range(answer + 1):
        left = paint_maze(maze.walls, maze.start, maze.goal, side)
        right = left.copy()
        paint_route(left, follow(maze.walls, maze.start, moves[tick]), n)
        if seen.attention is not None:
            weights = seen.attention[tick, pick].mean(0).cpu().numpy()
            height = int(len(weights) ** 0.5)
            right = paint_attention(right, weights.reshape(height, -1))
        margin, top = 14, 34
        frame = Image.new("RGB", (2 * left.width + 3 * margin, left.height + top + margin), (255, 255, 255))
        frame.paste(left, (margin, top))
        frame.paste(right, (2 * margin + left.width, top))
        draw = ImageDraw.Draw(frame)
        certain = float(thought.certainty[pick, tick])
        note = ", most certain: the answer" if tick == answer else ""
        draw.text((margin, 9), f"tick {tick + 1} of {len(moves)}   certainty {certain:.2f}{note}", fill=GREY, font=font)
        draw.text((2 * margin + left.width, 9), "attention, mean of heads", fill=GREY, font=font)
        frames.append(frame)
    return write_gif(frames, path)


@torch.no_grad()
def accuracy_map(task, model: nn.Module, path: Path, positions: str) -> Path:
    """How often each position of the answer is right at each tick, over the first test samples."""
    from matplotlib.figure import Figure

    device = next(model.parameters()).device
    *inputs, _ = batch = [part.to(device) for part in next(iter(task.test_dataloader()))]
    was_training = model.training
    model.eval()
    thought = model(*inputs)
    model.train(was_training)
    answers_BTP = rearrange(thought.predictions, "b t (p k) -> b t p k", k=task.out_dims[1]).argmax(-1)
    right_PT = (answers_BTP == task.targets(batch)[:, None]).float().mean(0).T.cpu()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    extent = (0.5, right_PT.shape[1] + 0.5, 0.5, right_PT.shape[0] + 0.5)
    image = axes.imshow(right_PT, aspect="auto", origin="lower", extent=extent, cmap="viridis", vmin=0.5, vmax=1)
    axes.set(xlabel="tick", ylabel=positions)
    figure.colorbar(image, label="share right")
    figure.savefig(path, dpi=120)
    return path
