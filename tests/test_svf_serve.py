"""The server: answers as if alone, routes, sampling, streams, refusals, limits, clients that hang up, shutting down."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from serving import TEMPLATE, adaptive, base, experts

from svf import __main__ as command
from svf.adapt import Route
from svf.engine import Closed, Engine, Job
from svf.tokenizer import byte_tokenizer

httpx, openai, *_ = (pytest.importorskip(extra) for extra in ("httpx", "openai", "starlette", "uvicorn"))

from svf import load  # noqa: E402
from svf import serve as serving  # noqa: E402

MODELS = {"base": None, "base+svf:a": "a", "base+svf:b": "b", "base+svf:auto": None}


def kind(requests):
    """The strategy: by the first letter."""
    return [{"p": "a", "q": "b", "r": {"a": 0.5, "b": -0.25}}.get(request[0]) for request in requests]


@contextmanager
def running(model, key=None, max_bytes=1 << 20, max_seconds=300.0, **settings):
    """A server in a thread."""
    api = serving.API(Engine(model, **settings), key, max_bytes, max_seconds)
    server = serving.Server(api)
    with serving.listen("127.0.0.1", 0, None) as listening:
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", api.engine
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join()


@pytest.fixture(scope="module")
def lone():
    """The same model again, for what it answers by itself."""
    model = adaptive(kind, "a", "b")
    known = {}

    def answer(prompt, mixture=None, max_tokens=20):
        key = prompt, str(mixture), max_tokens
        if key not in known:
            known[key] = load.Alone(model, prompt, model.library.weights(mixture), max_tokens)
        return known[key]

    return answer


@pytest.fixture(scope="module")
def server():
    with running(adaptive(kind, "a", "b"), slots=4, waiting=64, chunk=16, max_bytes=100_000) as (url, engine):
        yield url, engine


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server[0], api_key="none", max_retries=0) as client:
        yield client


def ask(client, prompt, model="base", **settings):
    messages = [{"role": "user", "content": prompt}]
    settings = {"temperature": 0, "max_tokens": 20} | settings
    return client.chat.completions.create(model=model, messages=messages, **settings)


def streamed(chunks):
    """(text, finish, route, usage) of a stream."""
    text, finish, route, usage = "", None, None, None
    for chunk in chunks:
        usage = chunk.usage or usage
        route = (chunk.model_extra or {}).get("route", route)
        for choice in chunk.choices:
            assert finish is None
            text, finish = text + (choice.delta.content or ""), choice.finish_reason
    return text, finish, route, usage


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def test_mixed_requests_in_parallel_are_each_as_alone(client, lone):
    rng = random.Random(0)
    ways = [(model, stream) for model in MODELS for stream in (False, True)] * 3

    def one(way):
        model, stream = way
        prompt = rng.choice("pqrs") + "".join(rng.choices("abcxyz0123+= é€", k=rng.randint(0, 50)))
        most = rng.randint(1, 25)
        mixture = kind([prompt])[0] if model == "base+svf:auto" else MODELS[model]
        label = mixture if isinstance(mixture, str) else "mixture" if mixture else "base"
        if stream:
            chunks = ask(client, prompt, model, max_tokens=most, stream=True, stream_options={"include_usage": True})
            text, finish, route, usage = streamed(chunks)
        else:
            answer = ask(client, prompt, model, max_tokens=most)
            text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
            route, usage = answer.model_extra["route"], answer.usage
        return prompt, mixture, label, most, text, finish, route, usage

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(one, ways))
    ties = 0
    for prompt, mixture, label, most, text, finish, route, usage in found:
        expected = lone(prompt, mixture, most)
        assert route["label"] == label
        assert route["mixture"] == ({mixture: 1.0} if isinstance(mixture, str) else mixture or {})
        found = expected.compare(text)
        ties += found == "tie"
        assert found != "wrong"
        if found == "tie":
            continue
        assert finish == expected.finish
        assert usage.prompt_tokens == len(prompt.encode())
        assert usage.completion_tokens == len(expected.tokens) == usage.total_tokens - usage.prompt_tokens
    assert ties <= 2


def test_under_load(server):
    asked = load.questions(adaptive(kind, "a", "b"), 24)
    report = asyncio.run(load.load(server[0], asked, clients=16, seconds=1.0))
    assert report.wrong == []
    assert report.counts["lost"] == report.counts["wrong"] == report.counts["wrong routes"] == 0
    assert report.counts["tie"] <= 1
    assert len(report.seconds) == report.counts["same"] + report.counts["tie"] >= 16
    assert {*load.DISTURBANCES} <= {*report.counts}, report.counts


def test_a_tie_within_a_character_of_several_tokens(monkeypatch):
    """Which shows no sooner than at its last token; the tie has to be at one of its own."""
    model = adaptive("base")
    ids, tokens = map(model.generator.encode, ("1+1=", "ab€cd"))  # seven, of which the third to the fifth are one
    written = SimpleNamespace(sequences=torch.tensor([ids + tokens]), logits=torch.eye(258)[tokens, None].unbind())
    monkeypatch.setattr(model.library.base, "generate", lambda **settings: written)
    alone = load.Alone(model, "1+1=", torch.zeros(0), 7)
    assert alone.text == "ab€cd"
    ties = {"~b€cd": [0], "a~€cd": [1], "ab~cd": [2, 3, 4], "ab€~d": [5], "ab€c~": [6]}
    for answer, tied in ties.items():
        for at in range(7):
            alone.margins = [1e-5 if n == at else 1.0 for n in range(7)]
            assert alone.compare(answer) == ("tie" if at in tied else "wrong"), (answer, at)


def test_what_a_load_counts_as_wrong():
    alone = load.Alone(adaptive("base"), "1+1=", torch.zeros(0), 30)
    alone.margins = [1.0] * 9 + [1e-5] + [1.0] * 20
    text = alone.text
    assert alone.compare(text) == "same"
    assert alone.compare(text[:9] + "~" + text[10:]) == "tie"
    for wrong in (text[:5] + "~" + text[6:], text[:14] + "~" + text[15:], "", text + "x", text[:20]):
        assert alone.compare(wrong) == "wrong"
    for later in (1, 2, 3):  # an answer that parts after its tie took the same token there
        assert alone.compare(text[: 9 + later] + "~" + text[10 + later :]) == "wrong"
    report = load.Report()
    question = load.Question("base", "1+1=", 30, alone, {"label": "base", "mixture": {}})
    for answer, finish, label in (
        (text, alone.finish, "base"),
        (text, "other", "base"),
        ("~", "stop", "base"),
        (text, alone.finish, "a"),
    ):
        report.check(question, answer, finish, {"label": label, "mixture": {}, "reason": "x"})
    assert report.counts == {"same": 3, "wrong": 1, "wrong routes": 1}
    assert len(report.wrong) == 3
    values = load.percentiles(range(200))
    assert (values[50], values[99], values[100]) == (100, 198, 199)


def test_stop_strings(client, lone):
    whole = lone("stop here", None, 40).text
    at = 10
    stop = whole[at : at + 3]
    cut = whole[: whole.index(stop)]
    for stops in (stop, ["not in there", stop], [stop, stop[:2] + "~"]):
        answer = ask(client, "stop here", max_tokens=40, stop=stops)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (cut, "stop")
        text, finish, *_ = streamed(ask(client, "stop here", max_tokens=40, stop=stops, stream=True))
        assert (text, finish) == (cut, "stop")
    assert ask(client, "stop here", max_tokens=40, stop=["~never~"]).choices[0].message.content == whole


def test_sampling_belongs_to_the_request_alone(client):
    settings = {"temperature": 1.2, "top_p": 0.95, "max_tokens": 30}
    first = ask(client, "sample", seed=5, **settings).choices[0].message.content
    with ThreadPoolExecutor(6) as pool:  # with others beside it
        others = [pool.submit(ask, client, f"other {i}", seed=i, **settings) for i in range(5)]
        again = ask(client, "sample", seed=5, **settings).choices[0].message.content
        different = {one.result().choices[0].message.content for one in others}
    assert first == again
    assert len(different | {first}) == 6
    assert ask(client, "sample", **settings).choices[0].message.content != first
    greedy = ask(client, "sample", max_tokens=30).choices[0].message.content
    assert ask(client, "sample", temperature=1.5, top_p=0, max_tokens=30).choices[0].message.content == greedy


def test_text_completions(client, lone):
    answer = client.completions.create(model="base+svf:a", prompt="p 1", temperature=0)
    assert answer.choices[0].text == lone("p 1", "a", 16).text  # 16 tokens, as OpenAI's
    chunks = client.completions.create(model="base", prompt="p 1", temperature=0, max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == lone("p 1", None, 9).text


def test_conversations(client, lone):
    messages = [
        {"role": "system", "content": "ignored"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": [{"type": "text", "text": "s last"}]},
    ]
    answer = client.chat.completions.create(model="base", messages=messages, temperature=0, max_completion_tokens=12)
    assert answer.choices[0].message.content == lone("s last", None, 12).text
    assert answer.choices[0].message.role == "assistant"
    model = adaptive("a", "a")
    model.tokenizer.chat_template = TEMPLATE
    with running(model) as (url, _), openai.OpenAI(base_url=url, api_key="none") as client:
        templated = client.chat.completions.create(
            model="base+svf:auto", messages=messages, temperature=0, max_tokens=12
        )
    said = "system: ignored\nuser: first\nassistant: no\nuser: s last\n:"
    assert templated.usage.prompt_tokens == len(said)
    assert templated.choices[0].message.content == lone(said, "a", 12).text
    assert templated.model_extra["route"] == {"label": "a", "reason": "asked for", "mixture": {"a": 1.0}}


def test_routes_are_described():
    weights = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, -1.0]])  # by layer
    route = Route(weights, "mixture", "found", {"a": 0.75, "other": 0.25})
    assert serving.described(route, ("a", "b", "c")) == {
        "label": "mixture",
        "reason": "found",
        "mixture": {"a": [0.5, 0.0], "c": [0.0, -1.0]},
        "scores": {"a": 0.75, "other": 0.25},
    }
    base = Route(torch.zeros(3), "base", "asked for")
    assert serving.described(base, ("a", "b", "c")) == {"label": "base", "reason": "asked for", "mixture": {}}


def test_models(client):
    assert [model.id for model in client.models.list()] == ["base", "base+svf:a", "base+svf:b", "base+svf:auto"]
    assert client.models.retrieve("base+svf:b").id == "base+svf:b"
    with pytest.raises(openai.NotFoundError, match="there are base, base\\+svf:a, base\\+svf:b, base\\+svf:auto"):
        client.models.retrieve("gpt")


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


GOOD = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("{", 400, "parse the JSON"),
        ("[" * 3000, 400, "parse the JSON"),
        (b"\xff\xfe", 400, "parse the JSON"),
        ('{"model": "\\ud800"}', 400, "parse the JSON"),
        ("[]", 400, "JSON object"),
        ("x" * 100_001, 413, "larger than 100000 bytes"),
        ({"model": "base+svf:c"}, 404, "there are base, base+svf:a, base+svf:b, base+svf:auto"),
        ({"model": ["base"]}, 404, "does not exist"),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content must be text"),
        ({"messages": [{"role": "boss", "content": "x"}]}, 400, "messages[0] must have a role"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "none of the user"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text parts"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "maximum context length is 512 tokens"),
        ({"max_tokens": 510}, 400, "has 5 and 510 for the answer"),
        ({"max_tokens": 0}, 400, "max_tokens must be an integer from 1 to 512, not 0"),
        ({"max_tokens": True}, 400, "max_tokens must be an integer"),
        ({"temperature": 3}, 400, "temperature must be a number from 0 to 2"),
        ({"temperature": float("nan")}, 400, "temperature must be a number"),
        ({"top_p": "x" * 100}, 400, "top_p must be a number from 0 to 1"),
        ({"seed": 1 << 70}, 400, "seed must be an integer"),
        ({"stop": [""]}, 400, "stop must be up to 4 strings"),
        ({"stream": "yes"}, 400, "stream must be true or false"),
        ({"n": 2}, 400, "n other than 1 is not supported"),
        ({"tools": [{}]}, 400, "tools other than [] is not supported"),
        ({"maxtokens": 2}, 400, 'Unrecognized request argument supplied: "maxtokens"'),
    ],
)
def test_bad_requests(server, body, status, said):
    if isinstance(body, dict):
        body = json.dumps(GOOD | body)
    answer = httpx.post(f"{server[0]}/chat/completions", content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_what_has_no_effect_is_taken_and_other_kinds_of_bodies_are_not(server):
    url = f"{server[0]}/chat/completions"
    extra = {"user": "me", "n": 1, "stop": None, "presence_penalty": 0.0, "tools": []}
    assert httpx.post(url, json=GOOD | extra).status_code == 200
    assert httpx.post(url, content=json.dumps(GOOD)).status_code == 415
    assert httpx.get(url).status_code == 405
    assert httpx.get(f"{server[0]}/nothing").json()["error"]["message"] == "Not Found"


def test_key():
    with running(adaptive("base"), key="secret") as (url, _):
        for word in (None, "Bearer wrong", "Bearer sécret", "secret", ""):
            headers = {} if word is None else {"Authorization": word.encode()}
            for method, path in (("GET", "models"), ("POST", "completions")):
                answer = httpx.request(method, f"{url}/{path}", headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        with openai.OpenAI(base_url=url, api_key="secret") as client:
            assert [model.id for model in client.models.list()] == ["base"]  # nothing to choose from


def test_beyond_this_machine_only_with_a_key(monkeypatch, capsys):
    monkeypatch.delenv(serving.KEY, raising=False)
    monkeypatch.setattr(sys, "argv", ["svf", "serve", "--base", "nowhere", "--host", "0.0.0.0", "--port", "0"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: 0.0.0.0 can be reached from other machines: set $SVF_API_KEY to a key")
    assert said.count("\n") == 1
    with serving.listen("0.0.0.0", 0, "secret") as taken, pytest.raises(OSError, match="cannot listen on 0"):
        serving.listen("0.0.0.0", taken.getsockname()[1], "secret")
    with pytest.raises(OSError, match="cannot listen on localhost:99999"):
        serving.listen("localhost", 99999, None)
    with pytest.raises(OSError, match="cannot listen on nowhere:80"):
        serving.listen("nowhere", 80, None)


def test_the_extra_is_named_where_it_is_missing(monkeypatch, capsys):
    for name in ("svf.serve", "starlette", "uvicorn"):
        monkeypatch.setitem(sys.modules, name, None) if name != "svf.serve" else monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("svf.serve", raising=False)
    monkeypatch.setattr(sys, "argv", ["svf", "serve", "--base", "nowhere"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    assert "pip install 'continuous-thought[serve]'" in capsys.readouterr().err


def test_too_many_waiting_and_too_slow():
    engine = Engine(adaptive("base"), waiting=1)  # which does not run
    api = serving.API(engine, max_seconds=0.0)
    server = serving.Server(api)
    with serving.listen("127.0.0.1", 0, None) as listening:
        thread = threading.Thread(target=super(serving.Server, server).run, args=[[listening]])
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/chat/completions"
        try:
            with ThreadPoolExecutor(1) as pool:
                late = pool.submit(httpx.post, url, json=GOOD, timeout=60)
                wait_for(lambda: engine.waiting)
                full = httpx.post(url, json=GOOD)
                assert (full.status_code, full.json()["error"]["code"]) == (429, "rate_limit_exceeded")
                assert full.headers["Retry-After"] == "1"
                engine.step()
                assert (late.result().status_code, late.result().json()["error"]["code"]) == (504, "timeout")
                engine.close()
                closed = httpx.post(url, json=GOOD)
                assert (closed.status_code, closed.json()["error"]["code"]) == (503, "shutting_down")
        finally:
            server.should_exit = True
            thread.join()


def test_a_failing_model_is_said_and_the_next_request_succeeds(monkeypatch, caplog):
    model = adaptive(kind, "a", "b")
    with running(model) as (url, _), openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        expected = ask(client, "p", "base+svf:a").choices[0].message.content
        mix, count = model.library.mix, iter(range(1000))

        def broken(weights):
            if next(count) == 3:
                raise RuntimeError("out of memory")
            return mix(weights)

        monkeypatch.setattr(model.library, "mix", broken)
        with pytest.raises(openai.InternalServerError, match="the model failed: RuntimeError"):
            ask(client, "p", "base+svf:a")
        assert "out of memory" in caplog.text
        assert ask(client, "p", "base+svf:a").choices[0].message.content == expected
        monkeypatch.setattr(model.strategy, "choose", lambda requests: [{}["nothing"]])
        with pytest.raises(openai.InternalServerError, match="the model failed: KeyError"):
            ask(client, "p", "base+svf:auto")
        assert ask(client, "p", "base+svf:a").choices[0].message.content == expected


# ----------------------------------------------------------------------------------------------------------------------
# Coming and going


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_clients_that_hang_up_free_their_rows(server, client, lone):
    url, engine = server
    long = {"model": "base", "messages": [{"role": "user", "content": "endless"}], "max_tokens": 500, "temperature": 0}
    with slowed(engine), httpx.stream("POST", f"{url}/chat/completions", json=long | {"stream": True}) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
        wait_for(lambda: len(engine.rows) == 1)
    wait_for(lambda: not engine.rows)
    with slowed(engine):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/chat/completions", json=long, timeout=0.3)
        wait_for(lambda: not engine.rows and not engine.waiting)
    assert ask(client, "s", "base+svf:b").choices[0].message.content == lone("s", "b").text


def test_a_second_signal_stops_at_once():
    model = adaptive("base")
    api = serving.API(Engine(model))
    server = serving.Server(api)
    with serving.listen("127.0.0.1", 0, None) as listening, slowed(api.engine):
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            chunks = ask(client, "endless", max_tokens=500, stream=True)
            next(iter(chunks))
            server.handle_exit(signal.SIGINT, None)
            assert not server.should_exit
            server.handle_exit(signal.SIGINT, None)
            thread.join()
            assert len(api.engine.rows[0].job.tokens) < 500


@contextmanager
def slowed(engine, seconds=0.005):
    """Steps take their time, so that an answer of 500 tokens is not over before a test has looked."""
    step = engine._write
    engine._write = lambda: (time.sleep(seconds), step())[1]
    try:
        yield
    finally:
        del engine._write


def test_a_request_that_takes_too_long_ends_while_others_go_on():
    engine = Engine(adaptive("base"), slots=2)
    said = [[], []]
    jobs = [Job("x", [65], 30, said[i].append, engine.adaptive.route(["x"])[0]) for i in range(2)]
    for job in jobs:
        engine.submit(job)
    engine.step()
    jobs[0].deadline = 0.0
    engine.close()
    with pytest.raises(Closed):
        engine.submit(jobs[0])
    engine.run()
    assert isinstance(said[0][-1], TimeoutError)
    assert len(jobs[1].tokens) == 30 or said[1][-1].finish == "stop"
    assert len(jobs[0].tokens) == 2


def test_stopping_finishes_what_is_running_and_waiting(lone):
    api = serving.API(Engine(adaptive(kind, "a", "b"), slots=1))
    server = serving.Server(api)
    with serving.listen("127.0.0.1", 0, None) as listening, slowed(api.engine), ThreadPoolExecutor(2) as pool:
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            chunks = iter(ask(client, "p 12", "base+svf:auto", max_tokens=60, stream=True))
            first = next(chunks)
            waiting = [pool.submit(ask, client, f"q {i}", "base+svf:b", max_tokens=9) for i in range(2)]
            wait_for(lambda: len(api.engine.waiting) == 2)
            server.handle_exit(signal.SIGTERM, None)
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                ask(client, "s")
            text, finish, *_ = streamed([first, *chunks])
            assert (text, finish) == (lone("p 12", "a", 60).text, lone("p 12", "a", 60).finish)
            for i, answer in enumerate(waiting):
                assert answer.result().choices[0].message.content == lone(f"q {i}", "b", 9).text
            thread.join()
            with pytest.raises(openai.APIConnectionError):
                ask(client, "s")


@pytest.mark.slow
def test_term_in_mid_stream_of_the_command(tmp_path, lone):
    folder = tmp_path / "base"
    base().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for name, expert in experts("a", "b").items():
        expert.save(tmp_path / name)
    words = [sys.executable, "-m", "svf", "serve", "--base", str(folder), "--port", "0", "--strategy", "b"]
    words += ["--experts", str(tmp_path / "a"), f"b={tmp_path / 'b'}"]
    root = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "SVF_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env, cwd=root) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("serving base, base+svf:a, base+svf:b, base+svf:auto at http://127.0.0.1:")
            url = line.split()[-1]
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                chunks = iter(ask(client, "p 12", "base+svf:auto", max_tokens=400, stream=True))
                first = next(chunks)
                process.send_signal(signal.SIGTERM)
                refused = httpx.post(f"{url}/chat/completions", json=GOOD)
                assert refused.status_code == 503
                text, finish, *_ = streamed([first, *chunks])
            assert (text, finish) == (lone("p 12", "b", 400).text, "length")
            assert process.wait(60) == 0
        finally:
            process.kill()


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def test_nothing_of_an_earlier_row_reaches_a_later_one(lone):
    engine = Engine(adaptive(kind, "a", "b"), slots=3, chunk=4)
    for slot in (*engine.batch.keys, *engine.batch.values):
        slot.fill_(torch.nan)
    said = {}
    for i, prompt in enumerate(["p long one, longer than others", "q", "r 22", "s", "p", "q 0123456789"] * 2):
        tell = said.setdefault((i, prompt), []).append
        engine.submit(Job(prompt, engine.adaptive.generator.encode(prompt), 5 + 3 * (i % 4), tell))
    engine.close()
    engine.run()
    for (i, prompt), pieces in said.items():
        assert "".join(piece.text for piece in pieces) == lone(prompt, kind([prompt])[0], 5 + 3 * (i % 4)).text
