"""Mazes: what they are, how they are kept apart, and how answers are judged."""

from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ctm.model import Thought
from tasks.maze import MazeTask, augment, distance, read_png, render, split_of, walk
from tasks.mazegen import ALGORITHMS, WAIT, Maze, follow, layout_hash, make_maze

hypothesis, st = (pytest.importorskip(module) for module in ("hypothesis", "hypothesis.strategies"))


def small(**kwargs) -> MazeTask:
    torch.manual_seed(0)
    return MazeTask(**{"size": 9, "route_length": 30, "n_val": 40, "n_test": 40, "batch_size": 8} | kwargs)


def shortest_path(maze: Maze) -> int:
    """By breadth-first search, which the generator does not use."""
    seen, edge, steps = {maze.start}, [maze.start], 0
    while maze.goal not in seen:
        steps += 1
        edge = [
            (r + dr, c + dc)
            for r, c in edge
            for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1))
            if not maze.walls[r + dr, c + dc] and (r + dr, c + dc) not in seen
        ]
        seen |= set(edge)
    return steps


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    size=st.integers(4, 20).map(lambda n: 2 * n + 1), seed=st.integers(0, 10**6), name=st.sampled_from(list(ALGORITHMS))
)
def test_a_maze_is_a_tree_with_its_one_route(size, seed, name):
    maze = make_maze(size, Random(seed), name)
    cells = ((size - 1) // 2) ** 2
    assert (~maze.walls).sum() == 2 * cells - 1  # cells and the edges of a spanning tree
    assert maze.walls[[0, -1]].all() and maze.walls[:, [0, -1]].all()
    places = follow(maze.walls, maze.start, maze.route)
    assert len(places) == len(maze.route) + 1 and places[-1] == maze.goal != maze.start
    assert len(maze.route) == shortest_path(maze)


def test_large_mazes_and_the_two_kinds():
    assert make_maze(99, Random(0)).walls.shape == (99, 99)
    mean = {name: np.mean([len(make_maze(39, Random(i), name).route) for i in range(60)]) for name in ALGORITHMS}
    assert mean["depth_first"] > 2 * mean["prim"], "depth-first mazes have long corridors"


def test_the_hash_sees_the_layout_alone():
    hashes = set()
    for seed in range(20):
        walls = make_maze(9, Random(seed)).walls
        forms = {layout_hash(np.rot90(m, k)) for m in (walls, walls[::-1]) for k in range(4)}
        assert len(forms) == 1
        hashes |= forms
    assert len(hashes) > 15


def test_no_test_layout_is_ever_trained_on():
    task = small(n_val=300, n_test=300, augment=True)
    layouts = {}
    for split, n in (("train", 2000), ("val", 300), ("test", 300)):
        images = np.stack([task.dataset(split)[i][0] for i in range(n)])
        layouts[split] = {layout_hash(image.max(0) == 0) for image in images}
    assert not layouts["train"] & layouts["test"]
    assert not layouts["train"] & layouts["val"]
    assert not layouts["val"] & layouts["test"]
    assert len(layouts["train"]) > 100


def test_split_shares():
    names = [split_of(make_maze(15, Random(i)).walls) for i in range(1000)]
    assert 760 < names.count("train") < 840
    assert 70 < names.count("test") < 130


def test_augmentation_keeps_the_route_right():
    forms = set()
    for seed in range(60):
        maze = make_maze(11, Random(seed % 4))
        image, route = augment(render(maze), maze.route, Random(seed))
        red, green, _ = image > 0.5
        walls = ~(red | green)
        start = tuple(map(int, np.argwhere(red & ~green)[0]))
        places = follow(walls, start, route)
        assert len(places) == len(route) + 1 and (green & ~red)[places[-1]]
        if seed % 4 == 0:
            forms.add(image.tobytes())
    assert len(forms) >= 6


def test_the_stream_is_the_same_at_any_number_of_workers():
    def first(workers):
        loader = small(num_workers=workers).train_dataloader()
        assert isinstance(loader, DataLoader)
        batches = iter(loader)
        return [next(batches) for _ in range(3)]

    for (x0, y0), (x2, y2) in zip(first(0), first(2), strict=True):
        assert torch.equal(x0, x2) and torch.equal(y0, y2)


def test_the_seed_moves_training_and_nothing_else():
    def draw(seed, split):
        torch.manual_seed(seed)
        return MazeTask(size=9, route_length=30, n_val=4, n_test=4).dataset(split)[0][0]

    assert not np.array_equal(draw(1, "train"), draw(2, "train"))
    assert np.array_equal(draw(1, "train"), draw(1, "train"))
    assert np.array_equal(draw(1, "test"), draw(2, "test"))


def test_samples_are_padded_cut_and_scaled():
    task = small(size=15, route_length=6)
    lengths = [len(task.dataset("test").maze(i).route) for i in range(40)]
    for i, length in enumerate(lengths):
        image, route = task.dataset("test")[i]
        assert route.shape == (6,) and (route[: min(6, length)] != WAIT).all() and (route[length:] == WAIT).all()
    assert image.min() == 0 and image.max() == 1
    torch.manual_seed(0)
    assert small(expand_range=True).dataset("test")[0][0].min() == -1
    share = np.mean([len(task.dataset("val").maze(i).route) > 6 for i in range(40)])
    assert f"{share:.1%} of routes are longer" in task.describe()


# ----------------------------------------------------------------------------------------------------------- metrics


def test_blue_walls_are_the_same_mazes():
    black, blue = small(), small(blue_walls=True)
    for i in range(5):
        one, other = (torch.from_numpy(task.dataset("test")[i][0]) for task in (black, blue))
        wall = (one == 0).all(0)
        assert torch.equal(wall, (other == torch.tensor([0, 0, 1.0])[:, None, None]).all(0))
        assert torch.equal(one[:, ~wall], other[:, ~wall])
        assert all(
            torch.equal(*pair) for pair in zip(black.read_image(one[None]), blue.read_image(other[None]), strict=True)
        )


def answer(moves: torch.Tensor, classes: int = 5) -> torch.Tensor:
    """Logits (B, T, P * 5) that say these moves (B, T, P)."""
    return (10.0 * torch.nn.functional.one_hot(moves, classes)).flatten(2)


@pytest.mark.parametrize("expand_range", [False, True])
def test_metrics_by_hand(expand_range):
    task = small(expand_range=expand_range)
    images, routes = (
        torch.from_numpy(np.stack(part)) for part in zip(*(task.dataset("test")[i] for i in range(4)), strict=True)
    )
    detour = routes.clone()  # up and back in place of waiting at the goal: reached, not solved
    length = (routes != WAIT).sum(1)
    detour[1, length[1] :] = 1 - (torch.arange(30 - length[1]) % 2)
    wall = routes.clone()
    wall[2, 0] = {0: 1, 1: 0, 2: 3, 3: 2}[int(routes[2, 0])]
    moves = torch.stack([torch.full_like(routes, WAIT), torch.stack([routes[0], detour[1], wall[2], routes[3]])], 1)
    certainty = torch.tensor([[0.1, 0.9], [0.1, 0.9], [0.1, 0.9], [0.9, 0.1]])  # the fourth is sure of doing nothing
    values = task.metrics(Thought(answer(moves), certainty), (images, routes))
    assert values["reached"].tolist() == [1, 1, 0, 0]
    assert values["solved"].tolist() == [1, 0, 0, 0]
    assert values["ticks"].tolist() == [2, 2, 2, 1]
    assert values["step_accuracy"][0] == 1
    assert values["step_accuracy"][2] == pytest.approx(29 / 30)
    assert values["step_accuracy"][3] == pytest.approx(float(30 - length[3]) / 30)
    assert values["solved_by_tick"][3].tolist() == [0, 1]
    last = task.metrics(Thought(answer(moves), certainty), (images, routes), most_certain=False)
    assert last["reached"].tolist() == [1, 1, 0, 1]


def test_a_route_through_a_wall_or_off_the_picture_reaches_nothing():
    maze = make_maze(9, Random(1))
    image = torch.from_numpy(render(maze))[None]
    task = small()
    for move in range(4):  # straight on until something stops it
        moves = torch.full((1, 1, 30), move)
        values = task.metrics(Thought(answer(moves), torch.ones(1, 1)), (image, torch.zeros(1, 30, dtype=torch.long)))
        walked = follow(maze.walls, maze.start, [move] * 30)
        assert bool(values["reached"]) == (maze.goal in walked)


# ---------------------------------------------------------------------------------------------------- re-application


class Oracle(torch.nn.Module):
    """Says the first `length` moves of the right route from wherever the start is, and then runs into a wall."""

    def __init__(self, task: MazeTask, mazes: list[Maze], length: int):
        super().__init__()
        self.task, self.length = task, length
        self.paths = {maze.walls.tobytes(): follow(maze.walls, maze.start, maze.route) for maze in mazes}
        self.routes = {maze.walls.tobytes(): maze.route for maze in mazes}
        self.asked = 0

    def forward(self, images):
        walls, start, _ = self.task.read_image(images)
        n, moves = walls.shape[-1], torch.full((len(images), 1, self.task.route_length), WAIT)
        self.asked += len(images)
        for i, (wall, place) in enumerate(zip(walls.numpy(), start.tolist(), strict=True)):
            at = self.paths[wall.tobytes()].index(divmod(place, n))
            route = self.routes[wall.tobytes()][at : at + self.length]
            moves[i, 0, : len(route)] = torch.tensor(route)
        return Thought(answer(moves), torch.ones(len(images), 1))


@pytest.mark.parametrize("expand_range", [False, True])
def test_reapplication_goes_on_from_where_the_last_route_ended(expand_range):
    task = small(size=21, route_length=12, reapply=4, expand_range=expand_range, n_test=30)
    dataset = task.dataset("test")
    mazes = [dataset.maze(i) for i in range(30)]
    batch = tuple(torch.from_numpy(np.stack(part)) for part in zip(*(dataset[i] for i in range(30)), strict=True))
    before = batch[0].clone()
    oracle = Oracle(task, mazes, 10)
    values = task.test_metrics(oracle, batch, most_certain=True)
    needed = [-(-len(maze.route) // 10) for maze in mazes]
    assert values["reapply_reached"].tolist() == [float(n <= 4) for n in needed] and len(set(needed)) > 3
    assert values["reapplications"].tolist() == [min(n, 4) for n in needed]
    assert oracle.asked == sum(min(n, 4) for n in needed), "who has arrived is not asked again"
    assert torch.equal(batch[0], before)
    assert task.difficulty(batch).tolist() == [len(maze.route) // 10 * 10 for maze in mazes]
    task.reapply = 0
    assert task.test_metrics(oracle, batch, most_certain=True) == {}


def test_reapplication_ends_where_nothing_new_is_reached():
    task = small(reapply=20)
    batch = tuple(
        torch.from_numpy(np.stack(part)) for part in zip(*(task.dataset("test")[i] for i in range(5)), strict=True)
    )

    class Still(torch.nn.Module):
        def forward(self, images):
            return Thought(answer(torch.full((len(images), 1, 30), WAIT)), torch.ones(len(images), 1))

    values = task.test_metrics(Still(), batch, most_certain=True)
    assert values["reapplications"].tolist() == [1] * 5 and values["reapply_reached"].sum() == 0


def test_a_walk_leaves_out_two_moves_into_walls_and_no_more():
    walls = torch.ones(1, 5, 5, dtype=torch.bool)
    walls[0, 1, 1:4] = False  # a corridor of three places
    up, right = 0, 3
    moves = torch.tensor([[up, right, up, right, up, right]])
    start = torch.tensor([6])
    assert walk(walls, start, moves, tolerance=2).tolist() == [[6, 7, 7, 8, 8, 8]]
    assert walk(walls, start, moves, tolerance=1).tolist() == [[6, 7, 7, 7, 7, 7]]
    assert walk(walls, start, moves).tolist() == [[6] * 6]
    assert distance(walls, start, torch.tensor([8])).tolist() == [2]


# ------------------------------------------------------------------------------------------------------------ folder


def write_folder(root, n=60, size=15) -> dict[str, list[Maze]]:
    mazes = {"train": [], "test": []}
    for i in range(n):
        maze = make_maze(size, Random(i))
        part = "test" if i % 6 == 0 else "train"
        mazes[part].append(maze)
        pixels = (render(maze) * 255).astype(np.uint8).transpose(1, 2, 0)
        for row, column in follow(maze.walls, maze.start, maze.route)[1:-1]:
            pixels[row, column] = (0, 0, 255)
        (root / part / "some").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / part / "some" / f"{i:03}.png")
    return mazes


def test_the_published_folder_format(tmp_path):
    mazes = write_folder(tmp_path)
    task = small(size=15, route_length=98, root=str(tmp_path), augment=False)
    for i, maze in enumerate(mazes["test"]):
        read = task.dataset("test").maze(i)
        assert read.route == maze.route and read.start == maze.start and read.goal == maze.goal
        assert np.array_equal(read.walls, maze.walls)
        assert np.array_equal(task.dataset("test")[i][0], render(maze)), "the blue route is not shown"
    n = len(task.files["train"])
    assert n + len(task.files["val"]) == len(mazes["train"]) and len(task.files["val"]) > 0
    twice = [task.dataset("train")[i][0].tobytes() for i in range(2 * n)]
    assert len(set(twice[:n])) == n and set(twice[n:]) == set(twice[:n]) and twice[n:] != twice[:n]


def test_broken_folders_are_named(tmp_path):
    write_folder(tmp_path, n=8)
    blank = tmp_path / "train" / "blank.png"
    Image.new("RGB", (15, 15)).save(blank)
    with pytest.raises(ValueError, match=r"blank\.png is not a square maze"):
        read_png(blank)
    blank.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="not a readable picture"):
        read_png(blank)
    with pytest.raises(ValueError, match="no PNG mazes"):
        small(root=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"blank\.png is not a readable picture"):  # the last of them, before a run
        small(root=str(tmp_path), size=15)
    blank.unlink()
    with pytest.raises(ValueError, match=r"data\.size is 9"):
        small(root=str(tmp_path))


@pytest.mark.parametrize(
    "wrong", [{"size": 10}, {"size": 7}, {"algorithm": "magic"}, {"route_length": 0}, {"batch_size": 0}]
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=f"data.{next(iter(wrong))}"):
        small(**wrong)


# ---------------------------------------------------------------------------------------------------------------- loss


def test_pace_asks_each_sample_for_its_own_next_moves():
    """Four moves in two ticks, two due at the first. One sample knows none yet, the other the first two: with a
    look-ahead of one they are asked for one and for two."""
    probability_right = torch.tensor([[0.1, 0.3, 0.4, 0.2], [0.5, 0.1, 0.3, 0.4]])
    probability_right = torch.stack([probability_right, torch.tensor([[0.2, 0.4, 0.6, 0.3], [0.6, 0.7, 0.2, 0.1]])])
    routes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    probabilities = torch.empty(2, 2, 4, 5)
    for (b, t, p), right in np.ndenumerate(probability_right.double().numpy()):
        probabilities[b, t, p] = float(1 - right) / 4
        probabilities[b, t, p, routes[b, p]] = float(right)
    thought = Thought(probabilities.log().flatten(2), torch.ones(2, 2))
    batch = torch.zeros(2, 3, 9, 9), routes
    published = small(route_length=4, lookahead=1).loss(thought, batch)
    # the first is right at its second tick (0.5 > 0.125), the second has two right at its own: 1 - 1 + 1 and 2 - 1 + 1
    asked = torch.tensor([0.1, 0.5, 0.2, 0.4, 0.6, 0.7])
    expected = float(published) - 0.5 * float(asked.log().mean())
    assert float(small(route_length=4, lookahead=1, pace=0.5).loss(thought, batch)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"data\.pace=-1 must be at least 0"):
        small(pace=-1)
