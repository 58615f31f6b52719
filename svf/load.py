"""python -m svf.bench serve: a server under load, every answer compared with the one that the model gives alone.

Clients ask for the base, for experts and for the strategy's choice, with prompts of the text tasks, streamed and not.
In between some hang up in the middle of an answer, or send what is no JSON, an unknown model, too long a prompt. At
the end the server is told to stop (SIGTERM) while all of them are being answered, which it has to finish first.

Answers are greedy. One that differs is a near tie where the two best logits were within 1e-4 of each other, alone, at
the token where it parts; anything else is wrong. Exit code 1 if an answer is wrong or lost, or a route another one.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import torch

from svf.__main__ import ROUTING, base_options, named, positive, routing_option
from svf.__main__ import load as load_model
from svf.adapt import Adaptive
from svf.engine import Alone
from svf.serve import AUTO, BASE, EXPERT, KEY, described
from tasks import text

LONGEST = 48
"""Tokens of an answer."""
DISTURBANCES = ("hung up", "hung up", "malformed", "unknown model", "oversized")


@dataclass
class Question:
    """A request and what has to come back."""

    model: str
    prompt: str
    max_tokens: int
    alone: Alone
    route: Mapping[str, Any]

    def body(self, **settings: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.prompt}]
        return {"model": self.model, "messages": messages, "max_tokens": self.max_tokens, "temperature": 0} | settings


@dataclass
class Report:
    """What has happened."""

    counts: collections.Counter = field(default_factory=collections.Counter)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Until the first part of a stream."""
    wrong: list[str] = field(default_factory=list)
    took: float = 0.0
    tokens: int = 0

    def check(self, question: Question, answer: str, finish: str | None, route: Mapping[str, Any] | None) -> None:
        found = question.alone.compare(answer)
        self.counts[found] += 1
        if found == "wrong" or (found == "same" and finish != question.alone.finish):
            self.wrong.append(
                f"{question.model} {question.prompt!r}: {answer!r} ({finish}), not {question.alone.text!r}"
            )
        if {k: v for k, v in (route or {}).items() if k in ("label", "mixture")} != question.route:
            self.counts["wrong routes"] += 1
            self.wrong.append(f"{question.model} {question.prompt!r}: route {route}, not {question.route}")

    def lines(self) -> list[str]:
        of = ", ".join(f"{n} {what}" for what, n in sorted(self.counts.items()))
        whole, first = percentiles(self.seconds), percentiles(self.first)
        return [
            f"requests  {of}",
            f"answer    p50 {whole[50]:.3f} s, p99 {whole[99]:.3f} s, slowest {max(self.seconds):.3f} s",
            f"first     p50 {first[50]:.3f} s, p99 {first[99]:.3f} s",
            f"rate      {len(self.seconds) / self.took:.1f} answers, {self.tokens / self.took:.0f} tokens a second",
        ]


def percentiles(values: Sequence[float]) -> list[float]:
    """The nth at index n."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, n * len(ordered) // 100)] for n in range(101)]


def questions(model: Adaptive, n: int, seed: int = 0) -> list[Question]:
    """Requests for all models in turn, of all text domains, some of several lines."""
    rng = random.Random(seed)
    samples = [s.prompt for domain in (*text.DOMAINS, *text.UNSEEN) for s in text.samples(domain, "test", n, seed)]
    names = [BASE, *(EXPERT + name for name in model.library.names), *([AUTO] if model.library.names else [])]
    found = []
    room = getattr(model.library.base.config, "max_position_embeddings", 1 << 20) - LONGEST
    for i in range(n):
        prompt = "\n".join(rng.sample(samples, rng.choice([1, 1, 1, 4])))
        if len(model.generator.encode(prompt)) > room:
            prompt = rng.choice(samples)
        name, most = names[i % len(names)], rng.randint(1, LONGEST)
        route = model.route([prompt])[0] if name == AUTO else None
        expert = name.removeprefix(EXPERT)
        weights = model.library.weights(expert) if route is None else route.weights
        said = {"label": expert, "mixture": {} if name == BASE else {expert: 1.0}}
        if route is not None:
            said = {key: part for key, part in described(route, model.library.names).items() if key in said}
        found.append(Question(name, prompt, most, Alone(model, prompt, weights, most), said))
    return found


async def ask(client: openai.AsyncOpenAI, question: Question, report: Report, stream: bool, streaming=None) -> None:
    """One request; `streaming` is called with its first part."""
    start = time.perf_counter()
    if not stream:
        answer = await client.chat.completions.create(**question.body())
        said, finish, route = (
            answer.choices[0].message.content,
            answer.choices[0].finish_reason,
            answer.model_extra["route"],
        )
        tokens = answer.usage.completion_tokens
    else:
        said, finish, route, tokens = "", None, None, 0
        async for chunk in await client.chat.completions.create(
            **question.body(stream=True, stream_options={"include_usage": True})
        ):
            if route is None:
                route = chunk.model_extra["route"]
                report.first.append(time.perf_counter() - start)
                if streaming:
                    streaming()
            for choice in chunk.choices:
                said, finish = said + (choice.delta.content or ""), choice.finish_reason
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    report.seconds.append(time.perf_counter() - start)
    report.tokens += tokens
    report.check(question, said, finish, route)


async def disturb(url: str, http: httpx.AsyncClient, question: Question, report: Report, what: str) -> None:
    """Something that a server has to stand."""
    if what == "hung up":
        async with http.stream("POST", url, json=question.body(stream=True, max_tokens=LONGEST)) as answer:
            async for _ in answer.aiter_lines():
                break
        report.counts["hung up"] += 1
        return
    bodies = {
        "malformed": (400, "{" + json.dumps(question.body())),
        "unknown model": (404, json.dumps(question.body(model="base+svf:nobody"))),
        "oversized": (400, json.dumps(question.body(messages=[{"role": "user", "content": "1+1=" * 20000}]))),
    }
    status, body = bodies[what]
    answer = await http.post(url, content=body, headers={"Content-Type": "application/json"})
    report.counts[what] += 1
    if answer.status_code != status or "message" not in answer.json()["error"]:
        report.counts["wrong refusals"] += 1
        report.wrong.append(f"{what}: {answer.status_code} {answer.text[:200]}")


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=url, api_key=os.environ.get(KEY, "none"), max_retries=0, timeout=120)


async def load(url: str, asked: Sequence[Question], clients: int, seconds: float, seed: int = 0) -> Report:
    """Keeps so many clients busy for so long. Each begins with a question and a disturbance, all kinds in turn."""
    report, start = Report(), time.perf_counter()

    async def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        turn = 0
        while turn < 2 or time.perf_counter() - start < seconds:
            question, what = rng.choice(asked), rng.choice(DISTURBANCES)
            disturbs = rng.random() < 0.15
            if turn < 2:
                disturbs, what = turn == 1, DISTURBANCES[number % len(DISTURBANCES)]
            turn += 1
            try:
                if disturbs:
                    await disturb(f"{url}/chat/completions", http, question, report, what)
                else:
                    await ask(api, question, report, stream=rng.random() < 0.5)
            except (openai.OpenAIError, httpx.HTTPError) as problem:
                report.counts["lost"] += 1
                report.wrong.append(f"{question.model} {question.prompt!r}: {problem!r}")

    headers = {"Authorization": f"Bearer {os.environ.get(KEY)}"}
    async with httpx.AsyncClient(timeout=120, headers=headers) as http, client_of(url) as api:
        await asyncio.gather(*map(client, range(clients)))
    report.took = time.perf_counter() - start
    return report


async def stop(process: subprocess.Popen, url: str, asked: Sequence[Question], clients: int) -> Report:
    """SIGTERM when every client has the first part of its answer: all have to be finished, and a new one refused."""
    report, streaming = Report(), asyncio.Semaphore(0)
    long = sorted(asked, key=lambda question: -len(question.alone.tokens))[:clients]
    async with client_of(url) as api:
        running = [asyncio.create_task(ask(api, one, report, True, streaming.release)) for one in long]
        for _ in long:
            await streaming.acquire()
        process.send_signal(signal.SIGTERM)
        try:
            await ask(api, asked[0], report, stream=False)
            report.wrong.append("a request after SIGTERM was accepted")
        except openai.APIConnectionError:  # there were no running answers any more
            report.counts["not connected"] += 1
        except openai.InternalServerError as problem:
            report.counts[f"refused with {problem.status_code}"] += 1
        for one in running:
            try:
                await one
            except (openai.OpenAIError, httpx.HTTPError) as problem:
                report.counts["lost"] += 1
                report.wrong.append(f"after SIGTERM: {problem!r}")
    code = await asyncio.to_thread(process.wait, 60)
    if code:
        report.wrong.append(f"the server's exit code is {code}")
    return report


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m svf.bench serve", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    base_options(parser)
    routing_option(parser)
    parser.add_argument("--clients", type=positive, default=16)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--questions", type=positive, default=96, help="different ones")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    try:
        run(args)
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    options = [
        f"--base={args.base}",
        f"--strategy={args.strategy}",
        *([f"--device={args.device}"] if args.device else []),
    ]
    given = [f"{name}={folder}" for name, folder in named(args.experts, "experts").items()]
    command = [sys.executable, "-m", "svf", "serve", "--port=0", *options, "--experts", *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            asked = questions(load_model(args, args.strategy, ROUTING), args.questions, args.seed)
            said = process.stdout.readline()
            if not said:
                raise ValueError(f"the server did not start: {shlex.join(command)}")
            url = said.split()[-1]
            report = asyncio.run(load(url, asked, args.clients, args.seconds, args.seed))
            stopped = asyncio.run(stop(process, url, asked, args.clients))
        finally:
            process.kill()
    print(f"{args.clients} clients, {report.took:.0f} s, {os.cpu_count()} cores, torch {torch.__version__}")
    print("\n".join(report.lines()))
    print(f"SIGTERM   {', '.join(f'{n} {what}' for what, n in sorted(stopped.counts.items()))}")
    if wrong := report.wrong + stopped.wrong:
        print("\n".join(wrong[:20]), file=sys.stderr)
        sys.exit(1)
