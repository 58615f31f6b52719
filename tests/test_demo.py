"""The interactive page: what its server computes, how it answers, and the page itself in a browser."""

import base64
import json
import re
import sys
from http.client import HTTPConnection
from random import Random
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from browser import CHROMIUM, DRIVER, browser, media, serving, until

import ctm.demo
from ctm import CTM, CTMConfig, Thinker, checkpoint
from ctm.baselines import LSTM, FeedForward, FFConfig, LSTMConfig
from ctm.demo import PAGE, SHIPPED, Demo, arguments, open_server
from ctm.encoders import ResNet
from ctm.loss import route_loss
from tasks.maze import MazeTask, render, split_of
from tasks.mazegen import WAIT, Maze, follow, make_maze
from tasks.run import UserError

SIZE, LENGTH, TICKS = 9, 30, 4
KNOWN, STRANGE = (5, 7), 10
"""Numbers of the mazes that the model of these tests knows by heart, with routes of 22 and 16 moves; and of another."""


def maze_of(seed: int, size: int = SIZE) -> Maze:
    return make_maze(size, Random(seed), "depth_first", lambda walls: split_of(walls) == "test")


def images_of(mazes: list[Maze]) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(maze) for maze in mazes]))


def save(model: Thinker, path, task: str = "tasks.maze.MazeTask", **data) -> None:
    config = {"task": "maze", "data": {"class_path": task, "init_args": {"size": SIZE, "route_length": LENGTH} | data}}
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    content = {"ctm": checkpoint.describe(model), "config": config, "state_dict": state, "global_step": 1}
    torch.save(content, path)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A model that knows two mazes by heart, as a shipped one is stored."""
    torch.manual_seed(0)
    c = CTMConfig(d_model=64, d_input=32, ticks=TICKS, heads=4, n_synch_out=16, n_synch_action=8, synapse_depth=1,
                  memory_length=4)  # fmt: skip
    model = Thinker(ResNet(32), CTM(c, (LENGTH, 5))).eval()
    mazes = [maze_of(seed) for seed in KNOWN]
    images, optimizer = images_of(mazes), torch.optim.AdamW(model.parameters(), lr=1e-3)
    routes = torch.tensor([maze.route + [WAIT] * (LENGTH - len(maze.route)) for maze in mazes])
    for _ in range(110):
        thought = model(images)
        optimizer.zero_grad()
        route_loss(thought.predictions, thought.certainty, routes, lookahead=LENGTH).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("demo")
    save(model, folder / "best.ckpt")
    checkpoint.export(folder / "best.ckpt", folder / "maze.safetensors")
    return folder / "maze.safetensors"


@pytest.fixture(scope="module")
def demo(learned) -> Demo:
    return Demo(learned)


def request(seed: int = KNOWN[0], size: int = SIZE, **changes) -> dict:
    maze = maze_of(seed, size)
    walls = "".join(str(int(wall)) for wall in maze.walls.flat)
    ends = {name: place[0] * size + place[1] for name, place in (("start", maze.start), ("goal", maze.goal))}
    return {"walls": walls} | ends | changes


def unpack(answer: dict) -> SimpleNamespace:
    def array(value):
        if not isinstance(value, dict):
            return value
        return np.frombuffer(base64.b64decode(value["data"]), value["dtype"]).reshape(value["shape"])

    return SimpleNamespace(**{name: array(value) for name, value in answer.items()})


def predicted(path, seed: int, ticks: int | None = None) -> list[list[int]]:
    """The route of every tick, by the model itself: flat places, up to the goal or the first wall."""
    maze = maze_of(seed)
    with torch.no_grad():
        thought = checkpoint.load(path)(images_of([maze]), ticks=ticks)
    routes = []
    for moves in thought.predictions[0].unflatten(-1, (LENGTH, 5)).argmax(-1).tolist():
        places = follow(maze.walls, maze.start, moves)
        places = places[: places.index(maze.goal) + 1] if maze.goal in places else places
        while len(places) > 1 and places[-1] == places[-2]:
            places.pop()
        routes.append([row * SIZE + column for row, column in places])
    return routes


# ----------------------------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("seed", [*KNOWN, STRANGE])
@pytest.mark.parametrize("ticks", [TICKS, 3 * TICKS])
def test_what_is_shown_is_what_the_model_says(demo, learned, seed, ticks):
    answer = unpack(demo.solve(request(seed, ticks=ticks)))
    maze, model = maze_of(seed), checkpoint.load(learned)
    with torch.no_grad(), ctm.record(model) as seen:
        thought = model(images_of([maze]), ticks=ticks)
    assert answer.certainty.tolist() == thought.certainty[0].tolist() and answer.answer == thought.certainty.argmax()
    shown = [places[: clean + 1].tolist() for places, clean in zip(answer.places, answer.clean, strict=True)]
    assert shown == predicted(learned, seed, ticks)
    goal = maze.goal[0] * SIZE + maze.goal[1]
    assert answer.reached.tolist() == [route[-1] == goal for route in shown]
    attention = seen.attention[:, 0].numpy()
    assert answer.attention.shape == (ticks, 4, 25) and np.abs(answer.attention / 65535 - attention).max() < 1e-5
    z_TN = seen.post_activations[:, 0, demo.neurons]
    assert np.abs(answer.neurons - 1000 * ((z_TN - demo.usual) / demo.spread).numpy()).max() < 0.6
    assert np.abs(answer.neurons).max() > 500
    assert answer.shortest == len(maze.route)
    if seed in KNOWN and ticks == TICKS:
        assert answer.reached[answer.answer] and answer.length[answer.answer] == len(maze.route)
        assert answer.teleport is None


def test_the_neurons_that_are_shown(demo):
    assert sorted(demo.neurons.tolist()) == list(range(64)), "all of them, where there are few"
    z_TD = torch.stack([demo.usual, demo.usual + demo.spread, demo.usual - 9 * demo.spread, demo.usual - 1e6])
    whole = torch.zeros(4, 64).scatter(1, demo.neurons.expand(4, -1), z_TD)
    expected = torch.tensor([0.0, 1000, -9000, -32000])[:, None].expand(4, 64)
    torch.testing.assert_close(demo.shown(whole), expected, rtol=1e-3, atol=1)


def test_teleports_are_the_published_reapplication(learned, tmp_path):
    """Mazes larger than those it was trained on, from one start to the next, as the test of the task does it."""
    model = checkpoint.load(learned)
    save(model, tmp_path / "larger.ckpt", size=15)
    demo, task = Demo(tmp_path / "larger.ckpt"), MazeTask(size=15, route_length=LENGTH, reapply=20)
    mazes = [maze_of(seed, 15) for seed in range(12)]
    values = task.test_metrics(model, (images_of(mazes), None), most_certain=True)
    reached, times = [], []
    for seed in range(12):
        ask, visited = request(seed, 15), []
        for thoughts in range(1, 21):  # noqa: B007
            answer = unpack(demo.solve(ask | {"visited": visited}))
            if answer.teleport is None:
                break
            visited.append(ask["start"])
            ask["start"] = answer.teleport
        reached.append(answer.places[answer.answer, answer.length[answer.answer]] == ask["goal"])
        times.append(thoughts)
    assert reached == values["reapply_reached"].bool().tolist()
    assert times == values["reapplications"].tolist() and max(times) > 2


def test_the_baselines_can_be_watched_too(tmp_path):
    torch.manual_seed(0)
    lstm = LSTM(LSTMConfig(d_model=16, d_input=8, ticks=3, heads=2), (LENGTH, 5))
    save(Thinker(ResNet(8), lstm), tmp_path / "lstm.ckpt")
    answer = unpack(Demo(tmp_path / "lstm.ckpt").solve(request(ticks=5)))
    assert answer.answer == 4 and answer.neurons.shape == (5, 16) and answer.attention.shape == (5, 2, 25)
    net = FeedForward(FFConfig(d_model=8), (LENGTH, 5), 25, 64)
    save(Thinker(ResNet(None), net), tmp_path / "ff.ckpt")
    demo = Demo(tmp_path / "ff.ckpt")
    answer = unpack(demo.solve(request()))
    assert answer.attention is None and answer.neurons is None and answer.certainty.shape == (1,)
    assert demo.about()["max_ticks"] == 1 and demo.about()["neurons"] == []


CLOSED = "1" * 10 + "0" + "1" * 69 + "0"  # a start in a cell of its own; the goal is in the corner


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"start": None}, "the maze has no start"),
        ({"goal": None}, "the maze has no goal"),
        ({"start": 0}, "the start is inside a wall"),
        ({"goal": 0}, "the goal is inside a wall"),
        ({"goal": 81}, "the goal is not in the maze"),
        ({"start": True}, "the start is not in the maze"),
        ({"start": maze_of(KNOWN[0]).goal[0] * SIZE + maze_of(KNOWN[0]).goal[1]}, "start and goal are the same place"),
        ({"walls": CLOSED, "start": 10, "goal": 80}, "no way leads from the start to the goal: open a wall"),
        ({"walls": "0" * 225}, "this model knows mazes of 9x9, 81 places; these are 225"),
        ({"walls": [0] * 81}, "the walls are no text of 0 (free) and 1 (wall)"),
        ({"walls": "0" * 80 + "2"}, "the walls are no text of 0 (free) and 1 (wall)"),
        ({"ticks": 501}, "this model can think for 1 to 500 ticks, not 501"),
        ({"ticks": 0}, "this model can think for 1 to 500 ticks, not 0"),
        ({"ticks": "4"}, "this model can think for 1 to 500 ticks, not 4"),
        ({"visited": "10"}, "the earlier starts are not a list of places"),
    ],
)
def test_what_cannot_be_solved_is_refused_in_a_sentence(demo, changes, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        demo.solve(request() | changes)


# ----------------------------------------------------------------------------------------------------------------------
# The server and its command line


@pytest.fixture(scope="module")
def url(learned):
    with serving(open_server(learned, port=0)) as url:
        yield url


def ask(url: str, method: str, path: str, body: bytes | None = None, **headers: str):
    """Status, headers and content of an answer."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    kind = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, body, kind | {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, dict(response.headers), content


def test_the_three_questions_of_the_page(url, demo):
    status, headers, page = ask(url, "GET", "/")
    assert status == 200 and page == PAGE.read_bytes()
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.search(rb"(src|href)=.?https?:|@import|url\(", page), "everything is in the file"
    about = json.loads(ask(url, "GET", "/model")[2])
    assert (about["size"], about["ticks"], about["look"]) == (SIZE, TICKS, [4, 5, 5])
    assert about["parameters"] == sum(p.numel() for p in demo.model.parameters())
    assert json.loads(ask(url, "GET", f"/maze?seed={STRANGE}")[2]) == {"seed": STRANGE} | request(STRANGE)
    answer = json.loads(ask(url, "POST", "/solve", json.dumps(request()).encode())[2])
    again = demo.solve(request())
    assert answer | {"seconds": 0} == json.loads(json.dumps(again | {"seconds": 0}))
    assert len(json.dumps(answer)) < 10_000


@pytest.mark.parametrize(
    ("question", "status", "sentence"),
    [
        (("POST", "/solve", b"{"), 400, "the request is not JSON"),
        (("POST", "/solve", b"\xff"), 400, "the request is not JSON"),
        (("POST", "/solve", b"[1]"), 400, "the request is not a JSON object"),
        (("POST", "/solve", json.dumps(request(goal=None)).encode()), 400, "the maze has no goal"),
        (("POST", "/other", b"{}"), 404, "there is no /other here to post to"),
        (("GET", "/../ctm/demo.py"), 404, "there is no /../ctm/demo.py here; the page is at /"),
        (("GET", "/maze?seed=-1"), 400, "the number of a maze is a whole number below"),
        (("GET", "/maze?seed=²"), 400, "the number of a maze is a whole number below"),
    ],
)
def test_refusals_of_the_server(url, question, status, sentence):
    method, path, *body = question
    found, _, content = ask(url, method, path.replace("²", "%C2%B2"), *body)
    assert found == status and sentence in json.loads(content)["error"]


def test_other_pages_cannot_ask(url):
    body = json.dumps(request()).encode()
    assert ask(url, "POST", "/solve", body, Content_Type="text/plain")[0] == 415
    assert ask(url, "GET", "/", Host="evil.example")[0] == 403
    assert ask(url, "GET", "/", Host="localhost:1")[0] == 200
    status, _, content = ask(url, "POST", "/solve", b"", Content_Length="2000000")
    assert status == 413 and "longer than 1048576 bytes" in json.loads(content)["error"]


def test_refusals_of_the_command_line(learned, url, tmp_path, monkeypatch, capsys):
    save(checkpoint.load(learned), tmp_path / "parity.ckpt", task="tasks.parity.ParityTask")
    monkeypatch.setattr(ctm.demo, "SHIPPED", tmp_path / "maze.safetensors")
    monkeypatch.setattr(open_server, "__defaults__", (tmp_path / "maze.safetensors", 8765, "127.0.0.1"))
    monkeypatch.chdir(tmp_path)
    taken = urlsplit(url).port
    for words, sentence in [
        ([], "the shipped model"),
        (["ckpt_path=none.ckpt"], "ckpt_path: there is no checkpoint none.ckpt"),
        (["ckpt_path=best"], "there is no best.ckpt under runs/maze"),
        (["ckpt_path=parity.ckpt"], "is a model of ParityTask; this page shows models of MazeTask"),
        ([f"ckpt_path={learned}", f"port={taken}"], f"cannot serve on host=127.0.0.1 port={taken}: Address already"),
        ([f"ckpt_path={learned}", "port=70000"], "port=70000 must be from 0"),
        (["port=many"], "port=many: expected a whole number"),
        (["prot=1"], "cannot read 'prot=1', did you mean 'port'?"),
    ]:
        monkeypatch.setattr(sys, "argv", ["demo", *words])
        with pytest.raises(SystemExit) as end:
            ctm.demo.main()
        printed = capsys.readouterr()
        assert end.value.code == 2 and sentence in printed.err and printed.err.startswith("error: "), words
        assert printed.err.count("\n") == 1


def test_only_who_asks_for_it_serves_others(learned, monkeypatch, capsys):
    assert arguments([]) == {} and arguments(["port=8000", "--host=::1"]) == {"port": 8000, "host": "::1"}
    monkeypatch.setattr(ctm.demo.Server, "serve_forever", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        monkeypatch.setattr(sys, "argv", ["demo", f"ckpt_path={learned}", "port=0", f"host={host}"])
        ctm.demo.main()
        printed = capsys.readouterr().out
        assert ("warning: host=0.0.0.0 lets everyone" in printed) == warned and f"open http://{host}:" in printed


def test_the_shipped_model_solves_most_mazes():
    if not SHIPPED.is_file():
        pytest.skip("the shipped maze model is not in this copy")
    demo = Demo(SHIPPED)
    answers = [unpack(demo.solve(demo.maze(seed))) for seed in range(20)]
    assert sum(answer.reached[answer.answer] for answer in answers) >= 19


# ----------------------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("selenium", reason="the page's tests need selenium: pip install -e '.[dev]'")
    if not CHROMIUM or not DRIVER:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    with browser() as driver:
        yield driver


class Page:
    """What a person does with the page."""

    def __init__(self, driver, url: str, seed: int):
        self.driver = driver
        driver.get(f"{url}?seed={seed}")
        self.wait("ready")

    def __getitem__(self, name: str):
        return self.driver.find_element("id", name)

    def wait(self, *states: str) -> None:
        until(self.driver, f"{list(states)}.includes(document.getElementById('maze').dataset.state)")

    def shown(self, name: str) -> list[int]:
        return [int(word) for word in (self["maze"].get_attribute(f"data-{name}") or "").split()]

    def solve(self) -> None:
        self["solve"].click()
        self.wait("solved", "ready")

    def actions(self):
        from selenium.webdriver import ActionChains

        return ActionChains(self.driver, duration=20)

    def at(self, place: int) -> tuple:
        """The maze, and how far a place is from its middle, in pixels."""
        cell = self["maze"].size["width"] / SIZE
        return self["maze"], round((place % SIZE - SIZE // 2) * cell), round((place // SIZE - SIZE // 2) * cell)

    def colours(self) -> np.ndarray:
        """The colour in the middle of every place, (81, 3)."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        return np.array(
            self.driver.execute_script(
                "const c = document.getElementById('maze'), p = c.getContext('2d'), n = arguments[0], s = c.width / n;"
                "return Array.from({length: n * n}, (_, i) => "
                "[...p.getImageData((i % n + .5) * s, (Math.floor(i / n) + .5) * s, 1, 1).data].slice(0, 3))",
                SIZE,
            )
        )

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["source"] == "javascript"]


def test_a_maze_is_solved_on_the_page(chromium, url, learned):
    page = Page(chromium, url, KNOWN[0])
    assert "walls it has never seen" in page["say"].text and not page.shown("route")
    page.solve()
    answer = unpack(Demo(learned).solve(request(KNOWN[0])))
    routes = predicted(learned, KNOWN[0])
    route, maze = routes[answer.answer], maze_of(KNOWN[0])
    assert page.shown("route") == route and len(route) == 23 and page.shown("tick") == [answer.answer]
    assert route[-1] == maze.goal[0] * SIZE + maze.goal[1]
    assert f"The route reaches the goal: 22 moves; at tick {answer.answer + 1}, " in page["say"].text
    if page["overlay"].is_selected():
        page["overlay"].click()
    blue = np.abs(page.colours() - [0, 114, 178]).max(1) < 8
    assert np.flatnonzero(blue).tolist() == sorted(route[1:-1]), "drawn, and nothing else is"

    # Another tick, by the keys of the slider; and what is seen of it.
    from selenium.webdriver.common.keys import Keys

    page["timeline"].send_keys(Keys.HOME)
    assert page.shown("route")[: page.shown("clean")[0] + 1] == routes[0] and page.shown("tick") == [0]
    assert page["where"].text == f"tick 1 of {TICKS}"
    assert page["sure"].text == f"{answer.certainty[0]:.2f} at tick 1"
    heads = page["heads"].find_elements("tag name", "button")
    assert [head.text for head in heads] == ["mean", "head 1", "head 2", "head 3", "head 4"]
    heads[2].click()
    assert heads[2].get_attribute("aria-pressed") == "true" and page["overlay"].is_selected()
    assert "Neuron" in page["chosen"].text and not page.errors()


def test_start_goal_and_walls_by_mouse(chromium, url, demo):
    page = Page(chromium, url, STRANGE)
    maze = request(STRANGE)
    free = [place for place in range(81) if maze["walls"][place] == "0"]
    to, other = [place for place in free if place not in (maze["start"], maze["goal"])][:2]
    wall = next(p for p in range(81) if maze["walls"][p] == "1" and 0 < p // 9 < 8 and 0 < p % 9 < 8)
    for name, place in (("start", to), ("goal", other)):
        page.actions().move_to_element_with_offset(*page.at(maze[name])).click_and_hold().move_to_element_with_offset(
            *page.at(place)
        ).release().perform()
        assert page.shown(name) == [place]
    page.actions().move_to_element_with_offset(*page.at(wall)).click().perform()
    drawn = "".join(map(str, chromium.execute_script("return [...maze.walls]")))
    assert drawn == maze["walls"][:wall] + "0" + maze["walls"][wall + 1 :]
    page.solve()
    answer = unpack(demo.solve({"walls": drawn, "start": to, "goal": other}))
    length = answer.length[answer.answer]
    assert page.shown("route") == answer.places[answer.answer, : length + 1].tolist()

    # A line of walls around the start: nothing is drawn over it, and the model is not asked.
    row, column = to // 9, to % 9
    for place in (to - 9, to + 9, to - 1, to + 1):
        if chromium.execute_script("return maze.walls[arguments[0]]", place) == 0 and place != other:
            page.actions().move_to_element_with_offset(*page.at(place)).click().perform()
    assert not page.shown("route"), f"the old route is gone (start in row {row}, column {column})"
    page.solve()
    assert page["say"].text == "No way leads from the start to the goal: open a wall between them."
    assert page["say"].get_attribute("class") == "bad"


def test_the_page_by_keys_alone(chromium, url):
    from selenium.webdriver.common.keys import Keys

    page = Page(chromium, url, KNOWN[1])
    maze = request(KNOWN[1])
    keys = page["maze"]
    keys.send_keys(*[Keys.ARROW_UP] * 9, *[Keys.ARROW_LEFT] * 9)
    assert page["cursor"].get_attribute("textContent") == "Row 1, column 1: wall."
    keys.send_keys(" ")
    assert page["say"].text == "The rim of the maze stays a wall."
    keys.send_keys("s")
    assert page["say"].text == "The start needs a free place." and page.shown("start") == [maze["start"]]
    place = next(p for p in range(81) if maze["walls"][p] == "0" and p not in (maze["start"], maze["goal"]))
    keys.send_keys(*[Keys.ARROW_DOWN] * (place // 9), *[Keys.ARROW_RIGHT] * (place % 9), "g")
    assert page.shown("goal") == [place]
    keys.send_keys(Keys.ENTER)
    page.wait("solved")
    assert page.shown("route")[0] == maze["start"]


def test_more_ticks_and_teleport(chromium, url, demo):
    """Thinks on beyond training, and from the last step of a route that ended too early."""
    seed = next(s for s in range(60) if demo.solve(request(s, ticks=7))["teleport"] is not None)
    page = Page(chromium, url, seed)
    chromium.execute_script(
        "const n = document.getElementById('number'); n.value = 501; n.dispatchEvent(new Event('input'))"
    )
    page.solve()
    assert page["say"].text == "This model can think for 1 to 500 ticks, not 501."
    chromium.execute_script(
        "const n = document.getElementById('number'); n.value = 7; n.dispatchEvent(new Event('input'))"
    )
    page.solve()
    first = unpack(demo.solve(request(seed, ticks=7)))
    assert page["timeline"].get_attribute("max") == "7" and page.shown("tick") == [first.answer]
    assert "Teleport goes on from its last step" in page["say"].text
    page["teleport"].click()
    page.wait("solved")
    maze = request(seed)
    second = unpack(demo.solve(maze | {"start": first.teleport, "ticks": 7, "visited": [maze["start"]]}))
    assert page.shown("start") == [first.teleport]
    assert page.shown("route") == second.places[second.answer, : second.length[second.answer] + 1].tolist()
    page["back"].click()
    assert page.shown("start") == [maze["start"]] and not page.shown("route")


def test_it_plays_where_motion_is_welcome(chromium, url):
    media(chromium, motion="no-preference")
    try:
        page = Page(chromium, url, KNOWN[0])
        page["solve"].click()
        page.wait("playing")
        page["play"].click()  # pause
        page.wait("solved")
        paused = page.shown("tick")
        page["play"].click()
        page.wait("playing")
        page.wait("solved")
        assert "The route reaches the goal" in page["say"].text and page.shown("tick") >= paused and not page.errors()
    finally:
        media(chromium)


def test_a_server_that_is_gone(chromium, url):
    page = Page(chromium, url, KNOWN[0])
    speed = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    chromium.execute_cdp_cmd("Network.enable", {})
    try:
        chromium.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True} | speed)
        page.solve()
        assert page["say"].text == "No answer from python -m ctm.demo: is it still running?"
    finally:
        chromium.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False} | speed)
    page.solve()
    assert "The route reaches the goal" in page["say"].text
