"""`python -m ctm.demo [ckpt_path=…] [port=…] [host=…]`: a local page on which a maze is drawn and solved, tick by tick.

ckpt_path   a maze model: a checkpoint, an exported .safetensors file, last or best; the shipped one where not given
port        8765; 0 takes a free one
host        127.0.0.1: this machine alone

The page is `demo.html`. It asks three things of this file: `GET model`, `GET maze` and `POST solve`.
"""

import base64
import json
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from random import Random, SystemRandom
from threading import Lock
from time import perf_counter
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ctm import checkpoint
from ctm.baselines import FeedForward
from ctm.record import record
from tasks.cli import RUNS, nearest
from tasks.maze import MazeTask, distance, render, split_of, walk
from tasks.mazegen import WAIT, Maze, make_maze
from tasks.metrics import answer_tick
from tasks.run import UserError, fail, find_checkpoint, read_run_checkpoint

SHIPPED = Path(__file__).parent / "assets" / "maze.safetensors"
PAGE = Path(__file__).parent / "demo.html"
MAX_TICKS = 500
MAX_BYTES = 2**20
"""Of a request: a maze of 99x99 takes some 10,000."""
NEURONS = 336
"""How many neurons the page shows, at most."""
HITS = 2
"""Moves into walls that re-application leaves out before a route ends, as in the published test (`tasks.maze`)."""


class Demo:
    """A maze model, and what the page asks of it. Places are flat: row * size + column.

    Raises:
        UserError: where the checkpoint is missing, damaged or not of a model that solves mazes.
    """

    def __init__(self, path: Path):
        if path == SHIPPED and not path.is_file():
            raise UserError(
                f"the shipped model {path} is missing; train one (python train.py task=maze), then give ckpt_path=best"
            )
        data = read_run_checkpoint(path)["config"].get("data") or {}
        if data.get("class_path") != f"{MazeTask.__module__}.{MazeTask.__qualname__}":
            kind = str(data.get("class_path", "no known task")).rpartition(".")[2]
            raise UserError(f"ckpt_path: {path} is a model of {kind}; this page shows models of MazeTask")
        try:
            self.task = MazeTask(**data.get("init_args", {}) | {"root": None})
            self.model = checkpoint.load(path)
        except (ValueError, TypeError) as error:
            raise UserError(f"ckpt_path: {error}") from error
        if self.model.net.out_dims != self.task.out_dims:
            raise UserError(f"ckpt_path: {path} answers {self.model.net.out_dims}, its task asks {self.task.out_dims}")
        net, n = self.model.net, self.task.size
        self.path, self.lock = path, Lock()
        self.ticks = getattr(net.config, "ticks", 1)
        self.max_ticks = 1 if isinstance(net, FeedForward) else max(MAX_TICKS, self.ticks)
        # Positions of attention: the map that the encoder makes of the picture, rows and columns alike.
        side = round(self.model.encoder.n_tokens(n, n) ** 0.5)
        self.look = [getattr(net.config, "heads", 0), side, side]
        self.choose_neurons()

    # ----------------------------------------------------------------------------------------------- what is answered
    def about(self) -> dict:
        """The model: sizes, and which neurons are shown."""
        return {
            "size": self.task.size,
            "ticks": self.ticks,
            "max_ticks": self.max_ticks,
            "route_length": self.task.route_length,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "name": self.path.name,
            "net": {"ctm": "Continuous Thought Machine", "lstm": "LSTM", "ff": "feed-forward net"}[
                checkpoint.describe(self.model)["net"]
            ],
            "d_model": self.model.net.config.d_model,
            "look": self.look,
            "neurons": self.neurons.tolist(),
        }

    def maze(self, seed: int) -> dict:
        """A maze whose wall layout no training maze had, in no orientation."""
        maze = make_maze(self.task.size, Random(seed), self.task.algorithm, lambda walls: split_of(walls) == "test")
        n = self.task.size
        return {
            "seed": seed,
            "walls": "".join("1" if wall else "0" for wall in maze.walls.flat),
            "start": maze.start[0] * n + maze.start[1],
            "goal": maze.goal[0] * n + maze.goal[1],
        }

    def solve(self, request: dict) -> dict:
        """Thinks about a maze and returns what happened at every tick t; arrays as `packed` makes them.

        Args:
            request: `walls` (n * n characters, 0 free, 1 wall), `start`, `goal`, and where wanted `ticks` and
                `visited`, the earlier starts of a chain of re-applications.

        Returns:
            `answer`: the tick that counts, the most certain one (the last for an LSTM), from 0. `certainty` (T,).
            `places` (T, P + 1): the walk along the predicted moves; up to two moves into walls are left out, and
            at the third it stops. `length` (T,): how many moves of it count, to the goal or to where it stops; `clean`
            (T,): how many of these before the first move into a wall. `reached` (T,): the goal, touching no wall.
            `teleport`: where re-application goes on, the last place of the answer that was no start before; None where
            there is none, or the goal was passed. `shortest`: moves of the shortest route. `attention` (T, heads, S),
            65535 for 1, and `neurons` (T, N), as `shown` says. The last two are None where the model has none.

        Raises:
            UserError: where the request is no maze with a way from start to goal.
        """
        maze, ticks, visited, shortest = self.understood(request)
        n, route_length = self.task.size, self.task.route_length
        begin = perf_counter()
        with self.lock:
            thought, seen = self.think([maze], ticks)
        seconds = perf_counter() - begin
        ticks, goal = thought.predictions.shape[1], maze.goal[0] * n + maze.goal[1]
        start = maze.start[0] * n + maze.start[1]
        moves = rearrange(thought.predictions[0], "t (p k) -> t p k", p=route_length).argmax(-1)
        walls = torch.from_numpy(maze.walls).expand(ticks, n, n)
        first = torch.full((ticks, 1), start)
        places = torch.cat([first, walk(walls, first[:, 0], moves, tolerance=HITS)], dim=1)
        stays = places[:, 1:] == places[:, :-1]
        blocked = stays & (moves != WAIT)
        number = torch.arange(1, route_length + 1)
        arrival = torch.where(places[:, 1:] == goal, number, route_length + 1).amin(1)
        length = torch.minimum(arrival, torch.where(~stays, number, 0).amax(1))
        clean = torch.minimum(length, (blocked.cumsum(1) == 0).sum(1))
        reached = arrival <= clean
        answer = int(answer_tick(thought.certainty, self.most_certain))
        onward = [place for place in places[answer, 1 : length[answer] + 1].tolist() if place not in {start, *visited}]
        return {
            "seconds": seconds,
            "answer": answer,
            "shortest": shortest,
            "teleport": onward[-1] if onward and arrival[answer] > route_length else None,
            "certainty": packed(thought.certainty[0], "<f4"),
            "places": packed(places, "<u2"),
            "length": packed(length, "<u2"),
            "clean": packed(clean, "<u2"),
            "reached": packed(reached, "|u1"),
            "attention": None if seen.attention is None else packed(seen.attention[:, 0] * 65535, "<u2"),
            "neurons": None
            if seen.post_activations is None
            else packed(self.shown(seen.post_activations[:, 0]), "<i2"),
        }

    # ------------------------------------------------------------------------------------------------ how it is done
    @property
    def most_certain(self) -> bool:
        return not (isinstance(self.model.net, checkpoint.LSTM) and self.task.lstm_answers_last)

    @torch.inference_mode()
    def think(self, mazes: list[Maze], ticks: int | None = None):
        """What the model thinks about mazes, and the recording of it."""
        images = torch.from_numpy(np.stack([render(maze, self.task.blue_walls) for maze in mazes]))
        if self.task.expand_range:
            images = 2 * images - 1
        with record(self.model) as seen:
            thought = self.model(images, ticks=ticks)
        return thought, seen

    def shown(self, z_TD: Tensor) -> Tensor:
        """How far the shown neurons are from what is usual for each: (T, N), 1000 being as far as they usually go."""
        return ((z_TD[:, self.neurons] - self.usual) / self.spread * 1000).clamp(-32000, 32000)

    def choose_neurons(self) -> None:
        """Which neurons are shown, and where: those that move most over a few mazes, sorted by likeness.

        They fill a grid column by column, by their first principal component into columns, by the second within one.
        """
        n = self.task.size
        mazes = [make_maze(n, Random(seed), self.task.algorithm) for seed in range(16)]
        _, seen = self.think(mazes)
        self.neurons, self.usual, self.spread = torch.arange(0), torch.ones(0), torch.ones(0)
        if seen.post_activations is None:
            return
        z_SD = seen.post_activations.flatten(0, 1)
        self.neurons = z_SD.std(0).topk(min(NEURONS, z_SD.shape[1])).indices
        z_SN = z_SD[:, self.neurons]
        away_SN = (z_SN - z_SN.mean(0)) / z_SN.std(0).clamp(min=1e-6)
        one, two = torch.linalg.svd(away_SN, full_matrices=False).Vh[:2]
        rows = max(1, round((len(one) / 2.33) ** 0.5))
        column = one.argsort().argsort() // rows
        order = (column * 2 + torch.sigmoid(two)).argsort()
        self.neurons, self.usual = self.neurons[order], z_SN[:, order].mean(0)
        self.spread = (z_SN[:, order] - self.usual).abs().quantile(0.98, dim=0).clamp(min=1e-6)

    def understood(self, request: dict) -> tuple[Maze, int, list[int], int]:
        """The maze, ticks, earlier starts, and the length of the shortest route.

        Raises:
            UserError: in words for the person who drew the maze.
        """
        if not isinstance(request, dict):
            raise UserError("the request is not a JSON object")
        n, walls = self.task.size, request.get("walls")
        if not isinstance(walls, str) or set(walls) - {"0", "1"}:
            raise UserError("the walls are no text of 0 (free) and 1 (wall), row by row")
        if len(walls) != n * n:
            raise UserError(f"this model knows mazes of {n}x{n}, {n * n} places; these are {len(walls)}")
        for name in ("start", "goal"):
            place = request.get(name)
            if place is None:
                raise UserError(f"the maze has no {name}")
            if type(place) is not int or not 0 <= place < n * n:
                raise UserError(f"the {name} is not in the maze")
            if walls[place] == "1":
                raise UserError(f"the {name} is inside a wall")
        start, goal, ticks = request["start"], request["goal"], request.get("ticks", self.ticks)
        if start == goal:
            raise UserError("start and goal are the same place")
        if type(ticks) is not int or not 1 <= ticks <= self.max_ticks:
            raise UserError(f"this model can think for 1 to {self.max_ticks} ticks, not {ticks}")
        visited = request.get("visited", [])
        if not isinstance(visited, list) or not all(type(place) is int for place in visited):
            raise UserError("the earlier starts are not a list of places")
        grid = np.frombuffer(walls.encode(), dtype=np.uint8).reshape(n, n) == ord("1")
        shortest = int(distance(torch.from_numpy(grid)[None], torch.tensor([start]), torch.tensor([goal])))
        if shortest == n * n:  # the flood never came there
            raise UserError("no way leads from the start to the goal: open a wall between them")
        return Maze(grid, divmod(start, n), divmod(goal, n), []), ticks, visited, shortest


def packed(values: Tensor, dtype: str) -> dict:
    """An array as a page can read it fast: its type in NumPy's notation, its shape, and its bytes in base64."""
    array = values.cpu().numpy()
    if array.dtype.kind == "f" and np.dtype(dtype).kind != "f":
        array = array.round()
    array = array.astype(dtype)
    return {"dtype": dtype, "shape": array.shape, "data": base64.b64encode(array.tobytes()).decode()}


# ----------------------------------------------------------------------------------------------------------------------
# The server


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, demo: Demo, host: str, port: int):
        self.demo, self.host = demo, host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    """Every answer is the page or JSON; a refusal is `{"error": sentence}`."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if not self.is_for_us():
            return
        if url.path == "/":
            self.reply(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif url.path == "/model":
            self.reply(self.server.demo.about())
        elif url.path == "/maze":
            seed = parse_qs(url.query).get("seed", [""])[0]
            if seed and not (seed.isascii() and seed.isdigit() and len(seed) < 10):
                self.refuse(HTTPStatus.BAD_REQUEST, "the number of a maze is a whole number below 1,000,000,000")
            else:
                self.reply(self.server.demo.maze(int(seed) if seed else SystemRandom().randrange(10**4)))
        else:
            self.refuse(HTTPStatus.NOT_FOUND, f"there is no {url.path} here; the page is at /")

    def do_POST(self) -> None:
        if not self.is_for_us():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/solve":
            return self.refuse(HTTPStatus.NOT_FOUND, f"there is no {self.path} here to post to; there is /solve")
        if not length.isdigit():
            return self.refuse(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long it is")
        if int(length) > MAX_BYTES:
            return self.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request is longer than {MAX_BYTES} bytes")
        # Of another page, in the same browser, this type would have to be allowed first: nobody else can ask.
        if self.headers.get_content_type() != "application/json":
            return self.refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the request is not application/json")
        try:
            answer = self.server.demo.solve(json.loads(self.rfile.read(int(length))))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            return self.refuse(HTTPStatus.BAD_REQUEST, "the request is not JSON")
        except UserError as error:
            return self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        self.reply(answer)

    def is_for_us(self) -> bool:
        """On loopback, refuses names that only look like this machine (DNS rebinding)."""
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        if not is_loopback(self.server.host) or is_loopback(name):
            return True
        self.refuse(HTTPStatus.FORBIDDEN, f"this page is served to this machine alone, not to {name!r}")
        return False

    def refuse(self, status: HTTPStatus, sentence: str) -> None:
        self.close_connection = True  # what is left of the request is not read
        self.reply({"error": sentence}, status=status)

    def reply(self, content: dict | bytes, kind: str = "application/json", status: HTTPStatus = HTTPStatus.OK) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
            "img-src data:; frame-ancestors 'none'",
        )
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Nothing is said of requests."""


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def open_server(ckpt_path: str | Path = SHIPPED, port: int = 8765, host: str = "127.0.0.1") -> Server:
    """A server that listens; `serve_forever` makes it answer.

    Raises:
        UserError: where the checkpoint cannot be shown, or the port not be had.
    """
    path = find_checkpoint(RUNS, ckpt_path, "maze", None) if ckpt_path in ("last", "best") else Path(ckpt_path)
    if not 0 <= port < 2**16:
        raise UserError(f"port={port} must be from 0 (any free one) to 65535")
    demo = Demo(path)
    try:
        return Server(demo, host, port)
    except OSError as error:
        hint = "" if port == 0 else f"; try another port, or port=0 for a free one: python -m ctm.demo port={port + 1}"
        raise UserError(f"cannot serve on host={host} port={port}: {error.strerror}{hint}") from error


def arguments(words: list[str]) -> dict:
    """`key=value` words as the arguments of `open_server`.

    Raises:
        UserError: for a word that is none.
    """
    given = {}
    for word in words:
        key, equals, value = word.lstrip("-").partition("=")
        if key not in ("ckpt_path", "port", "host") or not equals or not value:
            known = nearest(key, ["ckpt_path", "port", "host"])
            raise UserError(f"cannot read {word!r}{known}; arguments are ckpt_path=…, port=… and host=…")
        given[key] = value
    if "port" in given:
        if not (given["port"].isascii() and given["port"].isdigit()):
            raise UserError(f"port={given['port']}: expected a whole number")
        given["port"] = int(given["port"])
    return given


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    torch.set_num_threads(1)  # one maze is too little work to share out
    try:
        server = open_server(**arguments(sys.argv[1:]))
    except UserError as error:
        fail(str(error))
    about = server.demo.about()
    if not is_loopback(server.host):
        print(f"warning: host={server.host} lets everyone who can reach this machine use the page, without a password")
    print(f"{about['net']} for mazes {about['size']}x{about['size']}, {server.demo.path}")
    print(f"open {server.url} in a browser; Ctrl-C ends it", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


if __name__ == "__main__":
    main()
