"""Mazes: look at a picture with a start, a goal and walls, and say the moves that lead from one to the other.

Train, validation and test mazes never share a wall layout, in any orientation: a hash of the layout's canonical form
decides which of the three it belongs to (`split_of`).
"""

from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ctm.baselines import FeedForward
from ctm.loss import curriculum_mask, gather_tick, paced_loss, route_loss
from ctm.model import Thought
from tasks.base import Shuffled, Task
from tasks.mazegen import ALGORITHMS, DOWN, LEFT, MOVES, RIGHT, UP, WAIT, Maze, follow, layout_hash, make_maze
from tasks.metrics import answer_tick, classification
from tasks.seen import Sample, Survey

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, n, n) and routes (B, P)."""

# What a move becomes when the picture is turned or mirrored; published codes U, D, L, R, wait.
TURN_LEFT = {UP: LEFT, DOWN: RIGHT, LEFT: DOWN, RIGHT: UP, WAIT: WAIT}
TURN_RIGHT = {UP: RIGHT, DOWN: LEFT, LEFT: UP, RIGHT: DOWN, WAIT: WAIT}
MIRROR_COLUMNS = {UP: UP, DOWN: DOWN, LEFT: RIGHT, RIGHT: LEFT, WAIT: WAIT}
MIRROR_ROWS = {UP: DOWN, DOWN: UP, LEFT: LEFT, RIGHT: RIGHT, WAIT: WAIT}

SMALL = 15
"""Below this side there are few enough lengths of routes to tell them apart."""
REAPPLY = 20
"""How many times an analysis asks about a maze, as published, where the task does not say."""


def split_of(walls: np.ndarray) -> str:
    """train (80 %), val (10 %) or test (10 %) by the wall layout alone, the same for its eight orientations."""
    return _split(walls.tobytes(), len(walls))


@lru_cache(maxsize=2**14)  # small sizes have few layouts
def _split(walls: bytes, size: int) -> str:
    tenth = layout_hash(np.frombuffer(walls, dtype=bool).reshape(size, size)) % 10
    return {8: "val", 9: "test"}.get(tenth, "train")


def render(maze: Maze, blue_walls: bool = False) -> np.ndarray:
    """(3, n, n) floats in [0, 1]: free white, walls black (or blue), start red, goal green."""
    image = np.repeat(~maze.walls[None], 3, axis=0).astype(np.float32)
    if blue_walls:
        image[2] = 1
    image[:, maze.start[0], maze.start[1]] = (1, 0, 0)
    image[:, maze.goal[0], maze.goal[1]] = (0, 1, 0)
    return image


def augment(image: np.ndarray, route: list[int], rng: Random) -> tuple[np.ndarray, list[int]]:
    """The published augmentation: a quarter turn, a left-right and an up-down flip, each with probability 1/2."""
    if rng.random() < 0.5:
        left = rng.random() < 0.5
        image, route = (
            np.rot90(image, 1 if left else -1, axes=(1, 2)),
            _translate(route, TURN_LEFT if left else TURN_RIGHT),
        )
    if rng.random() < 0.5:
        image, route = image[:, :, ::-1], _translate(route, MIRROR_COLUMNS)
    if rng.random() < 0.5:
        image, route = image[:, ::-1], _translate(route, MIRROR_ROWS)
    return image, route


def _translate(route: list[int], code: dict[int, int]) -> list[int]:
    return [code[move] for move in route]


def read_png(path: Path) -> Maze:
    """A maze of the published folder format: the route painted blue from the red start to the green goal.

    Raises:
        ValueError: where the picture is not such a maze.
    """
    try:
        pixels = np.asarray(Image.open(path).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} is not a readable picture: {error}") from error
    red, green, blue = ((pixels == np.eye(3, dtype=np.uint8)[i] * 255).all(-1) for i in range(3))
    if pixels.shape[0] != pixels.shape[1] or red.sum() != 1 or green.sum() != 1:
        raise ValueError(f"{path} is not a square maze with one red start and one green goal")
    place, goal = (tuple(map(int, np.argwhere(colour)[0])) for colour in (red, green))
    start, todo, route = place, blue | green, []
    while place != goal:
        for move in (UP, DOWN, LEFT, RIGHT):
            row, column = place[0] + MOVES[move][0], place[1] + MOVES[move][1]
            if 0 <= row < len(todo) and 0 <= column < len(todo) and todo[row, column]:
                break
        else:
            raise ValueError(f"{path}: the blue route breaks off at row {place[0]}, column {place[1]}")
        place = int(row), int(column)
        todo[place] = False
        route.append(move)
    return Maze((pixels == 0).all(-1), start, goal, route)


class MazeSet(Dataset):
    """Mazes by position: `get(position)` gives one, the subclass says where it comes from; `[position]` is a sample."""

    def __init__(self, task: "MazeTask", split: str, length: int | None):
        self.task, self.split, self.length = task, split, length
        self.kept: dict[int, Maze] = {}

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the training stream has no end")
        return self.length

    def get(self, position: int) -> Maze:
        raise NotImplementedError

    def maze(self, position: int) -> Maze:
        """The maze as it is, before augmentation. Validation and test mazes are kept once made."""
        if self.split == "train":
            return self.get(position)
        if position not in self.kept:
            self.kept[position] = self.get(position)
        return self.kept[position]

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        maze = self.maze(position)
        image, route = render(maze, self.task.blue_walls), maze.route
        if self.split == "train" and self.task.augment:
            image, route = augment(image, route, Random(f"augment/{self.task.seed}/{position}"))
        if self.task.expand_range:
            image = 2 * image - 1
        limit = self.task.route_length
        route = route[:limit] + [WAIT] * (limit - len(route))
        return np.ascontiguousarray(image, dtype=np.float32), np.array(route, dtype=np.int64)


class GeneratedMazes(MazeSet):
    """Mazes made from (seed, split, position). Validation and test mazes are the same for every seed of a run."""

    def get(self, position: int) -> Maze:
        task, split = self.task, self.split
        seed = task.seed if split == "train" else ""
        rng = Random(f"{seed}/{split}/{position}")
        return make_maze(task.size, rng, task.algorithm, lambda walls: split_of(walls) == split)


class FolderMazes(MazeSet):
    """Mazes from PNG files. Training shuffles them anew on every pass."""

    def __init__(self, task: "MazeTask", split: str, paths: list[Path]):
        super().__init__(task, split, None if split == "train" else len(paths))
        self.paths = paths
        self.shuffled = Shuffled(len(paths), task.seed)

    def get(self, position: int) -> Maze:
        return read_png(self.paths[self.shuffled(position) if self.split == "train" else position])


def walk(walls: Tensor, start: Tensor, moves: Tensor, tolerance: int = 0) -> Tensor:
    """Routes, walked move by move. A move off the grid or into a wall is left out; after more than `tolerance` of them
    nothing moves any more.

    Args:
        walls: (B, n, n) bool.
        start: (B,) flat places.
        moves: (B, P) move codes.

    Returns:
        Flat places after every move, (B, P).
    """
    n = walls.shape[-1]
    step = torch.tensor(MOVES, device=walls.device)
    row, column = start // n, start % n
    hits, places = torch.zeros_like(start), []
    for move in moves.T:
        to_row, to_column = row + step[move, 0], column + step[move, 1]
        inside = (to_row >= 0) & (to_row < n) & (to_column >= 0) & (to_column < n)
        place = to_row.clamp(0, n - 1) * n + to_column.clamp(0, n - 1)
        free = inside & ~walls.flatten(1).gather(1, place[:, None]).squeeze(1)
        hits = hits + ~free
        go = free & (hits <= tolerance)
        row, column = torch.where(go, to_row, row), torch.where(go, to_column, column)
        places.append(row * n + column)
    return torch.stack(places, dim=1)


def distance(walls: Tensor, start: Tensor, goal: Tensor) -> Tensor:
    """Length of the shortest route, by a flood from the start: walls (B, n, n) and flat places (B,) -> (B,)."""
    n = walls.shape[-1]
    wet = F.one_hot(start, n * n).view_as(walls).bool()
    steps = torch.zeros_like(start)
    for _ in range(n * n):
        dry = ~wet.flatten(1).gather(1, goal[:, None]).squeeze(1)
        if not dry.any():
            break
        steps += dry
        spread = wet.clone()
        spread[:, 1:] |= wet[:, :-1]
        spread[:, :-1] |= wet[:, 1:]
        spread[:, :, 1:] |= wet[:, :, :-1]
        spread[:, :, :-1] |= wet[:, :, 1:]
        wet = spread & ~walls
    return steps


class MazeTask(Task):
    """Mazes made on the fly, or read from a folder.

    Args:
        size: side in pixels, odd; a maze of size n has (n - 1) / 2 cells a side.
        route_length: moves that are predicted; shorter routes are padded with "wait", longer ones cut.
        algorithm: how mazes grow: long corridors (depth_first, as published) or many dead ends (prim).
        lookahead: how many moves beyond the longest right prefix the curriculum of the loss looks.
        pace: weight of `ctm.loss.paced_loss` beside the published loss: moves asked one after the other.
        augment: quarter turns and flips of training mazes, as published.
        expand_range: pixels in [-1, 1] instead of [0, 1].
        blue_walls: paints walls blue instead of black, which a model that has not seen it is lost in.
        n_val: validation mazes, where they are made.
        n_test: test mazes, where they are made.
        root: folder of PNG mazes in the published format (`train/` and `test/` under it) to use instead; layouts of
            its training part whose hash says so are kept for validation, and none of its test part is trained on.
        reapply: how many times, at most, the model is asked about a test maze, each time with the start where its last
            route ended, so that it can go farther than one route; 0 for no such test.
        batch_size: training mazes of a step, per process.
        eval_batch_size: the same in validation and test.
        num_workers: processes that make training mazes; 0 makes them in the main process.
    """

    headline = "reached"
    replayable = True
    lstm_answers_last = True
    position_name = "move"

    def __init__(
        self,
        size: int = 39,
        route_length: int = 100,
        algorithm: Literal["depth_first", "prim"] = "depth_first",
        lookahead: int = 5,
        pace: float = 0.0,
        augment: bool = True,
        expand_range: bool = False,
        n_val: int = 1000,
        n_test: int = 1000,
        root: str | None = None,
        reapply: int = 0,
        batch_size: int = 64,
        eval_batch_size: int = 250,
        num_workers: int = 0,
        blue_walls: bool = False,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        if size % 2 == 0 or size < 9:
            raise ValueError(f"data.size={size}: the side of a maze is odd and at least 9; take {max(9, size + 1)}")
        if algorithm not in ALGORITHMS:
            raise ValueError(f"data.algorithm={algorithm!r}: there are {', '.join(ALGORITHMS)}")
        self.at_least(route_length=(route_length, 1), lookahead=(lookahead, 1), n_val=(n_val, 1), n_test=(n_test, 1))
        self.at_least(reapply=(reapply, 0), pace=(pace, 0))
        self.size, self.route_length, self.algorithm, self.lookahead = size, route_length, algorithm, lookahead
        self.pace = pace
        self.augment, self.expand_range, self.blue_walls = augment, expand_range, blue_walls
        self.n_val, self.n_test = n_val, n_test
        self.root, self.reapply = Path(root).expanduser() if root else None, reapply
        self.out_dims, self.sample_size = (route_length, 5), (size, size)
        self.difficulty_name = "route length (moves" + (")" if size < SMALL else ", rounded down to tens)")
        self.sets: dict[str, MazeSet] = {}
        self.files = self._files() if self.root else {}

    # ---------------------------------------------------------------------------------------------------------- data
    def dataset(self, split: str) -> MazeSet:
        if split not in self.sets:
            length = {"train": None, "val": self.n_val, "test": self.n_test}[split]
            self.sets[split] = (
                FolderMazes(self, split, self.files[split]) if self.root else GeneratedMazes(self, split, length)
            )
        return self.sets[split]

    def _files(self) -> dict[str, list[Path]]:
        """PNG files of each split; every one is read, to know its layout and that it can be."""

        def walls_of(path: Path) -> np.ndarray:
            walls = read_png(path).walls
            if len(walls) != self.size:
                raise ValueError(
                    f"data.root={self.root}: {path.name} is {len(walls)} pixels wide, data.size is {self.size}"
                )
            return walls

        found = {part: sorted((self.root / part).glob("**/*.png")) for part in ("train", "test")}
        for part, paths in found.items():
            if not paths:
                raise ValueError(f"data.root={self.root}: there are no PNG mazes in {self.root / part}")
        files = {"train": [], "val": [], "test": found["test"]}
        tested = {layout_hash(walls_of(path)) for path in files["test"]}
        for path in found["train"]:
            walls = walls_of(path)
            if layout_hash(walls) not in tested:
                files["val" if split_of(walls) == "val" else "train"].append(path)
        for split, paths in files.items():
            if not paths:
                raise ValueError(f"data.root={self.root}: no mazes are left for {split}")
        return files

    def describe(self) -> str:
        mazes = self.dataset("val")
        cut = np.mean([len(mazes.maze(i).route) > self.route_length for i in range(len(mazes))])
        return f"mazes {self.size}x{self.size}, {cut:.1%} of routes are longer than route_length={self.route_length}"

    # ------------------------------------------------------------------------------------------------ loss and metrics
    def loss(self, thought: Thought, batch: Batch, most_certain: bool = True) -> Tensor:
        loss = route_loss(thought.predictions, thought.certainty, batch[1], self.lookahead, most_certain)
        if self.pace:
            asked_BP = curriculum_mask(thought.predictions, batch[1], self.lookahead)
            loss = loss + self.pace * paced_loss(thought.predictions, batch[1], asked_BP)
        return loss

    @torch.no_grad()
    def metrics(self, thought: Thought, batch: Batch, most_certain: bool = True) -> dict[str, Tensor]:
        """Published definitions: `step_accuracy` over all positions, padding too, and `solved`, all of them right.
        `reached` is what people mean: the route leads to the goal without touching a wall."""
        images, routes = batch
        walls, start, goal = self.read_image(images)
        moves_BTP = rearrange(thought.predictions, "b t (p k) -> b t p k", k=5).argmax(-1)
        tick_B = answer_tick(thought.certainty, most_certain)
        values = classification(thought, routes, 5, most_certain)
        return {
            "reached": (walk(walls, start, gather_tick(moves_BTP, tick_B)) == goal[:, None]).any(1).float(),
            **{name.replace("accuracy", "step_accuracy"): value for name, value in values.items()},
        }

    def test_metrics(self, model: nn.Module, batch: Batch, most_certain: bool) -> dict[str, Tensor]:
        """Re-application, where it is asked for."""
        return self.apply_again(model, batch[0], most_certain, self.reapply) if self.reapply else {}

    @torch.no_grad()
    def apply_again(self, model: nn.Module, images: Tensor, most_certain: bool, times: int) -> dict[str, Tensor]:
        """Re-application, as published: follow the route, leaving out up to two moves into walls; start again from the
        last place on it that was no start before; until the goal is passed, or it was asked so many times."""
        images, device = images.clone(), images.device
        walls, place, goal = self.read_image(images)
        high, low = 1.0, -1.0 if self.expand_range else 0.0
        reached, asked = torch.zeros_like(place, dtype=torch.bool), torch.zeros_like(place)
        was_start = F.one_hot(place, walls[0].numel()).bool()
        going = torch.arange(len(images), device=device)
        for _ in range(times):
            thought = model(images[going])
            answer = gather_tick(thought.predictions, answer_tick(thought.certainty, most_certain))
            moves = rearrange(answer, "b (p k) -> b p k", k=5).argmax(-1)
            places = walk(walls[going], place[going], moves, tolerance=2)
            asked[going] += 1
            arrived = (places == goal[going, None]).any(1)
            reached[going] = arrived
            new = ~was_start[going].gather(1, places)
            last = (new * torch.arange(1, new.shape[1] + 1, device=device)).argmax(1)
            onward = ~arrived & new.any(1)
            going, end = going[onward], gather_tick(places, last)[onward]
            if len(going) == 0:
                break
            pixels = images.flatten(2)
            pixels[going, :, place[going]] = high  # the old start is free floor now, the new one red
            pixels[going, :, end] = images.new_tensor([high, low, low])
            place[going], was_start[going, end] = end, True
        return {"reapply_reached": reached.float(), "reapplications": asked.float()}

    @torch.no_grad()
    def explore(self, model: nn.Module, most_certain: bool) -> dict[str, tuple[np.ndarray, ...]]:
        """Re-application on mazes of this size, and on larger ones: length of the route, reached at once, and again."""
        found, device = {}, next(model.parameters()).device
        fixed = isinstance(model.net, FeedForward) and not model.net.config.pool
        for size, n in ((self.size, 96), (2 * self.size - 1, 48)):
            if fixed and size != self.size:
                continue
            rng = Random(f"explore/{size}")
            mazes = [make_maze(size, rng, self.algorithm, lambda walls: split_of(walls) == "test") for _ in range(n)]
            images = torch.from_numpy(np.stack([render(maze, self.blue_walls) for maze in mazes])).to(device)
            images = 2 * images - 1 if self.expand_range else images
            walls, start, goal = self.read_image(images)
            thought = model(images)
            answer = gather_tick(thought.predictions, answer_tick(thought.certainty, most_certain))
            moves = rearrange(answer, "b (p k) -> b p k", k=5).argmax(-1)
            once = (walk(walls, start, moves) == goal[:, None]).any(1).float()
            again = self.apply_again(model, images, most_certain, self.reapply or REAPPLY)["reapply_reached"]
            length = np.array([len(maze.route) for maze in mazes])
            found[f"{size}x{size}"] = length, once.cpu().numpy(), again.cpu().numpy()
        return found

    def difficulty(self, batch: Batch) -> Tensor:
        """Moves from start to goal, rounded down to tens; in small mazes as they are."""
        moves = distance(*self.read_image(batch[0]))
        return moves // 10 * 10 if self.size >= SMALL else moves

    def read_image(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Walls (B, n, n) bool, start and goal (B,) as flat places."""
        red, green, _ = (images > (0 if self.expand_range else 0.5)).unbind(1)
        return ~(red | green), (red & ~green).flatten(1).int().argmax(1), (green & ~red).flatten(1).int().argmax(1)

    # ------------------------------------------------------------------------------------------------------- pictures
    def words(self, sample: Sample) -> tuple[str, str]:
        """Moves as arrows, waiting left out."""

        def arrows(moves: np.ndarray) -> str:
            return "".join("↑↓←→ "[int(move)] for move in moves).strip()

        return arrows(sample.probabilities[sample.answer].argmax(-1)), arrows(sample.batch[1])

    def solving(self, sample: Sample, name: str) -> list:
        from tasks import figures

        walls, start, goal = (part[0].numpy() for part in self.read_image(torch.from_numpy(sample.batch[0])[None]))
        n = len(walls)
        start, goal = divmod(int(start), n), divmod(int(goal), n)
        routes = [follow(walls, start, moves.tolist()) for moves in sample.probabilities.argmax(-1)]
        right = follow(walls, start, [int(move) for move in sample.batch[1] if move != WAIT])
        far = f"{len(right) - 1}" if right[-1] == goal else f"more than {len(right) - 1}"
        result = "reached" if sample.values["reached"] else "not reached"
        return [
            figures.Picture(
                f"{name}-maze", f"A maze of {n}x{n}, {result}",
                f"The goal (star) is {far} moves from the start (dot). Left the route as it is predicted at"
                " each tick, up to the first wall it runs into; middle where attention looks, walls in grey.",
                partial(
                    figures.maze, walls, start, goal, right, routes, sample.certainty, sample.answer, sample.attention
                ),
            )
        ]  # fmt: skip

    def statistics(self, survey: Survey) -> list:
        from tasks import figures

        sets = survey.more
        if not sets:
            return super().statistics(survey)
        return [
            *super().statistics(survey),
            figures.Picture(
                "reapplication", "Going on from where the route ended",
                f"The model is asked again and again, each time with the start where its last route ended, at most"
                f" {self.reapply or REAPPLY} times: so it can go beyond the {self.route_length} moves it predicts at"
                " one look, and through mazes larger than it was trained on. Bars are 95 % intervals.",
                partial(figures.reapplication, sets, self.route_length),
            ),
        ]  # fmt: skip
