"""An OpenAI-compatible server of one base model and its experts: `python -m svf serve`.

Models are `base`, `base+svf:NAME`, and `base+svf:auto`, where the strategy decides for every request. An answer's field
`route` says what it was: {"label": ..., "reason": ..., "mixture": {expert: weight}}, where the mixture differs by layer
a list of weights; where the request was classified also `scores`, {kind: probability}.

The server listens on the loopback interface. Beyond it, it wants a key, which it reads from $SVF_API_KEY. SIGTERM and
Ctrl-C finish the answers that were accepted and refuse new requests; a second signal stops at once.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route as Path

from svf.adapt import Adaptive, Route
from svf.engine import Closed, Engine, Full, Job, Piece

KEY = "SVF_API_KEY"
BASE, EXPERT, AUTO = "base", "base+svf:", "base+svf:auto"
ROLES = ("system", "developer", "user", "assistant", "tool")
SECONDS_TO_SEND = 30.0
"""What a client has for its request's body."""
SECONDS_TO_READ = 10.0
"""What clients have for the rest of their answers after the last one is complete and the server wants to leave."""

UNSUPPORTED = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
"""Parameters that would change the answer, by the only value they may have."""
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
WITHOUT_EFFECT |= {"parallel_tool_calls"}
UNDERSTOOD = {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"}


class Refusal(Exception):
    """What a client is told instead of an answer, as OpenAI's servers put it."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body, self.status, headers)

    @classmethod
    def of(cls, problem: Exception) -> "Refusal":
        """For what stopped the engine."""
        if isinstance(problem, TimeoutError):
            return cls(504, str(problem), "timeout")
        if isinstance(problem, ValueError):
            return cls(400, str(problem))
        logging.getLogger(__name__).error("the model failed", exc_info=problem)
        return cls(500, f"the model failed: {type(problem).__name__}")


# ----------------------------------------------------------------------------------------------------------------------
# Requests


def number(body: Mapping[str, Any], name: str, kind: type, default: Any, low: float, high: float) -> Any:
    """A parameter between two bounds.

    Raises:
        Refusal: for anything else.
    """
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if not fits or not low <= value <= high:
        what = "a number" if kind is float else "an integer"
        raise Refusal(400, f"{name} must be {what} from {low} to {high}, not {_short(value)}", param=name)
    return value


def stop_strings(body: Mapping[str, Any]) -> list[str]:
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(one, str) and one for one in stop):
        raise Refusal(400, f"stop must be up to 4 strings, not {_short(stop)}", param="stop")
    return stop


def check_parameters(body: Mapping[str, Any], own: set[str]) -> None:
    """Refuses what would be ignored, where ignoring it would give another answer than the one that was asked for."""
    for name, value in body.items():
        if value is None or name in UNDERSTOOD | WITHOUT_EFFECT | own:
            continue
        if name not in UNSUPPORTED:
            raise Refusal(400, f"Unrecognized request argument supplied: {_short(name)}", "unknown_parameter", name)
        if value != UNSUPPORTED[name]:
            raise Refusal(400, f"{name} other than {json.dumps(UNSUPPORTED[name])} is not supported", None, name)


def conversation(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages, each with a role and its text."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages must be a list of at least one message", param="messages")
    found = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Refusal(400, f"{where} must have a role, one of {', '.join(ROLES)}", param=where)
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise Refusal(400, f"{where}.content must be text, or a list of text parts", param=f"{where}.content")
        found.append({"role": message["role"], "content": content})
    return found


def _short(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# ----------------------------------------------------------------------------------------------------------------------
# Answers


@dataclass(frozen=True)
class Form:
    """How an endpoint writes answers."""

    prefix: str
    whole: str
    part: str
    chat: bool

    def choice(self, text: str, finish: str | None, part: bool = False, first: bool = False) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text}
        if self.chat and part:
            said = {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})}
        elif self.chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}


CHAT = Form("chatcmpl-", "chat.completion", "chat.completion.chunk", chat=True)
TEXT = Form("cmpl-", "text_completion", "text_completion", chat=False)


def usage(job: Job) -> dict[str, int]:
    """Tokens; those of the answer with the one that ended it."""
    asked, answered = len(job.prompt), len(job.tokens)
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def described(route: Route, names: tuple[str, ...]) -> dict[str, Any]:
    """A route as JSON; of the mixture only the experts that have a part in it."""
    columns = zip(names, route.weights.unbind(-1), strict=True)
    mixture = {name: weights.tolist() for name, weights in columns if weights.any()}
    scores = {"scores": dict(route.scores)} if route.scores else {}
    return {"label": route.label, "reason": route.reason, "mixture": mixture} | scores


class Events(StreamingResponse):
    """A stream of server-sent events; where it ends for whatever reason, so does the job."""

    def __init__(self, events: AsyncIterator[str], job: Job):
        super().__init__(events, headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancelled = True


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of some work, which is given up where the client hangs up.

    Raises:
        ClientDisconnect: then.
    """

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


# ----------------------------------------------------------------------------------------------------------------------
# The server


class API:
    """The endpoints over an engine.

    Args:
        engine: whose `run` works in another thread.
        key: what clients have to bring, if any.
        max_bytes: of a request's body.
        max_seconds: from a request's arrival to the end of its answer.
    """

    def __init__(self, engine: Engine, key: str | None = None, max_bytes: int = 1 << 20, max_seconds: float = 300.0):
        self.engine, self.key, self.max_bytes, self.max_seconds = engine, key, max_bytes, max_seconds
        self.library, self.generator = engine.library, engine.adaptive.generator
        self.generator.tokenizer("a")  # switches padding and truncation off, so that threads only read it from now on
        self.created = int(time.time())
        self.app = Starlette(
            routes=[
                Path("/v1/chat/completions", self.chat, methods=["POST"]),
                Path("/v1/completions", self.complete, methods=["POST"]),
                Path("/v1/models", self.models),
                Path("/v1/models/{name:path}", self.model),
            ],
            exception_handlers={
                Refusal: lambda request, refusal: refusal.response(),
                HTTPException: lambda request, found: Refusal(found.status_code, found.detail).response(),
                ClientDisconnect: lambda request, gone: Response(status_code=499),  # which nobody sees
                Exception: lambda request, problem: Refusal(500, "the server failed").response(),
            },
        )

    @property
    def names(self) -> list[str]:
        experts = [EXPERT + name for name in self.library.names]
        return [BASE, *experts, *([AUTO] if experts else [])]

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self.names]})

    async def model(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse(self._described(self._known(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        """A conversation. A model without chat template gets the last user message as it is, and nothing else."""
        body = await self._body(request)
        check_parameters(body, {"messages", "max_completion_tokens"})
        messages = conversation(body)
        said = [message["content"] for message in messages if message["role"] == "user"]
        if not said:
            raise Refusal(400, "messages has none of the user", param="messages")
        asked = messages if self.generator.tokenizer.chat_template else said[-1]
        limit = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
        return await self._answer(request, body, CHAT, asked, number(body, limit, int, None, 1, self.engine.context))

    async def complete(self, request: Request) -> Response:
        body = await self._body(request)
        check_parameters(body, {"prompt"})
        if not isinstance(body.get("prompt"), str):
            raise Refusal(400, "prompt must be a string", param="prompt")
        most = number(body, "max_tokens", int, 16, 1, self.engine.context)  # 16 is OpenAI's
        return await self._answer(request, body, TEXT, body["prompt"], most)

    def _check_key(self, request: Request) -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if self.key and not (scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), self.key.encode())):
            raise Refusal(401, "Incorrect API key provided", "invalid_api_key")

    async def _body(self, request: Request) -> dict[str, Any]:
        self._check_key(request)
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the request must have the header Content-Type: application/json")
        data = bytearray()
        try:
            async with asyncio.timeout(SECONDS_TO_SEND):
                async for part in request.stream():
                    data += part
                    if len(data) > self.max_bytes:
                        raise Refusal(413, f"the request is larger than {self.max_bytes} bytes")
        except TimeoutError:
            raise Refusal(408, f"the request did not arrive within {SECONDS_TO_SEND:g} seconds") from None
        try:
            body = json.loads(data)
            json.dumps(body, ensure_ascii=False).encode()  # no halves of characters, which no tokenizer reads
        except (ValueError, RecursionError) as problem:
            raise Refusal(400, f"We could not parse the JSON body of your request: {problem}") from None
        if not isinstance(body, dict):
            raise Refusal(400, "the body of the request must be a JSON object")
        return body

    def _known(self, name: Any) -> str:
        if name not in self.names:
            there = f"there are {', '.join(self.names)}"
            raise Refusal(404, f"The model {_short(name)} does not exist; {there}", "model_not_found", "model")
        return name

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "svf"}

    def _route(self, name: str) -> Route | None:
        """What a model's name stands for, None where the strategy is to decide."""
        if name == AUTO:
            return None
        expert = name.removeprefix(EXPERT)
        return Route(self.library.weights(expert), expert, "asked for")

    async def _answer(self, request: Request, body: dict, form: Form, asked: Any, most_tokens: int | None) -> Response:
        arrived = time.monotonic()
        name = self._known(body.get("model"))
        options = body.get("stream_options") or {}
        if not isinstance(options, dict) or not isinstance(body.get("stream") or False, bool):
            raise Refusal(400, "stream must be true or false, stream_options an object", param="stream")
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
        try:
            prompt = await asyncio.to_thread(self.generator.encode, asked)
        except (ValueError, TypeError, jinja2.TemplateError) as problem:
            raise Refusal(400, f"the request cannot be read: {problem}") from None
        room = self.engine.context - len(prompt)
        if room < (most_tokens or 1):
            wanted = f" and {most_tokens} for the answer" if most_tokens else ""
            raise Refusal(
                400,
                f"This model's maximum context length is {self.engine.context} tokens; the request has "
                f"{len(prompt)}{wanted}",
                "context_length_exceeded",
            )
        job = Job(
            asked,
            prompt,
            most_tokens or room,
            tell=lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece),
            route=self._route(name),
            temperature=number(body, "temperature", float, 1.0, 0, 2),
            top_p=number(body, "top_p", float, 1.0, 0, 1),
            seed=number(body, "seed", int, None, -(1 << 63), (1 << 63) - 1),
            stop=stop_strings(body),
            deadline=arrived + self.max_seconds,
        )
        try:
            self.engine.submit(job)
        except Full as problem:
            raise Refusal(429, str(problem), "rate_limit_exceeded") from None
        except Closed as problem:
            raise Refusal(503, str(problem), "shutting_down") from None
        same = {"id": form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": name}
        try:
            if body.get("stream"):
                first = await unless_gone(request, _next(pieces))
                return Events(self._events(job, form, same, first, pieces, options.get("include_usage") is True), job)
            choice = form.choice(*await unless_gone(request, _all(pieces)))
        except BaseException:
            job.cancelled = True
            raise
        answer = {"object": form.whole, "choices": [choice], "usage": usage(job), "route": self._said(job)}
        return JSONResponse(same | answer)

    def _said(self, job: Job) -> dict[str, Any]:
        return described(job.route, self.library.names)

    async def _events(self, job: Job, form: Form, same: dict, piece: Piece, pieces: asyncio.Queue, count: bool):
        """The answer as server-sent events; the first one has the route, the last one before [DONE] the usage."""
        same = same | {"object": form.part} | ({"usage": None} if count else {})
        extra = {"route": self._said(job)}
        while True:
            choice = form.choice(piece.text, piece.finish, part=True, first=bool(extra))
            yield _event(same | {"choices": [choice]} | extra)
            extra = {}
            if piece.finish:
                break
            try:
                piece = await _next(pieces)
            except Refusal as refusal:
                yield _event(refusal.body)
                return
        if count:
            yield _event(same | {"choices": [], "usage": usage(job)})
        yield "data: [DONE]\n\n"


async def _next(pieces: asyncio.Queue) -> Piece:
    piece = await pieces.get()
    if isinstance(piece, Exception):
        raise Refusal.of(piece) from piece
    return piece


async def _all(pieces: asyncio.Queue) -> tuple[str, str]:
    """The whole text, and why it ends."""
    text, finish = "", None
    while not finish:
        piece = await _next(pieces)
        text, finish = text + piece.text, piece.finish
    return text, finish


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


class Server(uvicorn.Server):
    """Runs an API and its engine. The first signal lets running answers finish, the second one does not."""

    def __init__(self, api: API):
        super().__init__(
            uvicorn.Config(
                api.app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=SECONDS_TO_READ,
            )
        )
        self.engine = api.engine

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.engine.closing:
            self.should_exit = self.force_exit = True
        self.engine.close(at_once=self.force_exit)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        worker = threading.Thread(target=self._work, daemon=True)
        worker.start()
        super().run(sockets)
        worker.join()
        if not self.engine.closing:
            sys.exit(1)  # the worker has said why

    def _work(self) -> None:
        try:
            self.engine.run()
        finally:
            self.should_exit = True


def listen(host: str, port: int, key: str | None) -> socket.socket:
    """A socket; one beyond this machine only with a key.

    Raises:
        ValueError: where there is none.
        OSError: where the address cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not key and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
            raise ValueError(
                f"{host} can be reached from other machines: set ${KEY} to a key that clients have to bring"
            )
        return socket.create_server((address[0], port), family=family)
    except (OSError, OverflowError) as problem:
        why = getattr(problem, "strerror", problem)
        raise OSError(f"cannot listen on {host}:{port}: {why}") from None


def serve(
    load: Callable[[], Adaptive],
    host: str = "127.0.0.1",
    port: int = 8000,
    max_bytes: int = 1 << 20,
    max_seconds: float = 300.0,
    **settings: Any,
) -> None:
    """Serves until a signal. The address is taken before the model is loaded; `settings` are those of `Engine`."""
    key = os.environ.get(KEY)
    with listen(host, port, key) as listening:
        api = API(Engine(load(), **settings), key, max_bytes, max_seconds)
        shown, port = f"[{host}]" if ":" in host else host, listening.getsockname()[1]
        print(f"serving {', '.join(api.names)} at http://{shown}:{port}/v1", flush=True)
        Server(api).run([listening])
