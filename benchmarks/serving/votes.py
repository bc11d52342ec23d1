"""Measure raters who vote at once: `python -m benchmarks.serving.votes`.

Fifty raters of one comparison have joined by links, half of them at each of two API processes. In
each round all of them send a vote at the same moment, on their own connections; the time of each is
from then until its answer. The baseline is the same with `GET /healthz`, which asks nobody, in the
rounds between. Seeing the next pair is not measured, but done by all at once, too. At the end the
votes in Redis are counted: none may be lost.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks import report
from benchmarks.report import Row
from benchmarks.serving.load_generator import connection, read_whole, request_bytes
from deploy.local.cluster import Cluster
from service.comparisons.model import (
    Arm,
    Comparison,
    Contender,
    HalfState,
    Pair,
    Prompt,
    RatingPlan,
    SharedSettings,
    ViewingCopy,
)
from service.comparisons.rating.raters import RaterStore
from service.comparisons.rating.votes import VoteStore
from service.comparisons.store import ComparisonStore, new_comparison_id, new_pair_id

RATERS = 50
BOUND_MS = 100.0
PROMPTS = 200


@dataclass(frozen=True, slots=True)
class Rater:
    """A rater's open connection and the session that is sent on it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    cookie: str

    async def send(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Send one request and read the whole answer."""
        headers = {"Cookie": self.cookie, "Sec-Fetch-Site": "same-origin"}
        headers["Content-Type"] = "application/json"
        self.writer.write(request_bytes(method, path, headers, body))
        return await read_whole(self.reader)


def main(
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of votes.")] = 40,
    warm_up: Annotated[int, typer.Option(min=0, help="Rounds before them.")] = 5,
) -> None:
    """Run the rounds and write the result."""
    engine = (sys.executable, "-m", "benchmarks.serving.fake_worker", "0")
    with (
        tempfile.TemporaryDirectory(prefix="wan-bench-") as folder,
        Cluster(Path(folder), apis=2, workers=1, worker=engine) as cluster,
    ):
        rows = asyncio.run(measure(cluster, rounds, warm_up))
    settings = {
        "raters": RATERS,
        "apis": 2,
        "rounds": rounds,
        "warm_up": warm_up,
        "pairs": PROMPTS,
        "cores": os.cpu_count(),
        "load_average": [round(each, 1) for each in os.getloadavg()],
    }
    document = report.result("votes", "cpu", settings, rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))


async def measure(cluster: Cluster, rounds: int, warm_up: int) -> list[Row]:
    """Alternate rounds of votes and of the baseline, on the same connections."""
    comparison = store_comparison(cluster)
    raters = RaterStore(cluster.redis)
    links = [raters.add(comparison.id, f"rater {number}") for number in range(RATERS)]
    cookies = [join(cluster.urls[n % 2], token) for n, (_, token) in enumerate(links)]
    ports = [int(url.rsplit(":", 1)[1]) for url in cluster.urls]
    contexts = [connection(ports[number % 2]) for number in range(RATERS)]
    opened = [await each.__aenter__() for each in contexts]
    seated = [Rater(*pair, cookie) for pair, cookie in zip(opened, cookies, strict=True)]
    votes: list[float] = []
    health: list[float] = []
    for number in range(warm_up + rounds):
        found = await asyncio.gather(*(each.send("GET", "/rating/next") for each in seated))
        items = [json.loads(body)["item"] for _, body in found]
        health_s = await at_once(seated, "GET", ["/healthz"] * RATERS, b"", 200)
        paths = [f"/rating/items/{item}/vote" for item in items]
        votes_s = await at_once(seated, "POST", paths, VOTE, 201)
        if number >= warm_up:
            health += health_s
            votes += votes_s
    for context in contexts:
        await context.__aexit__(None, None, None)
    store = VoteStore(cluster.redis)
    stored = sum(len(store.answers(comparison.id, rater.id)) for rater, _ in links)
    sent = RATERS * (rounds + warm_up)
    assert stored == sent, f"{sent - stored} of {sent} votes are lost"
    return [
        Row(
            f"p99 of a vote, {RATERS} raters at once (bound {BOUND_MS:g} ms; baseline: healthz)",
            percentile_ms(votes, 99),
            "ms",
            baseline=percentile_ms(health, 99),
        ),
        Row("median of a vote", percentile_ms(votes, 50), "ms", baseline=percentile_ms(health, 50)),
        Row("votes sent", sent, "votes"),
        Row("votes lost", sent - stored, "votes"),
    ]


async def at_once(
    raters: Sequence[Rater], method: str, paths: Sequence[str], body: bytes, expected: int
) -> list[float]:
    """Have every rater send a request at the same moment; return the seconds until each answer."""
    started = time.perf_counter()

    async def one(rater: Rater, path: str) -> float:
        status, answer = await rater.send(method, path, body)
        assert status == expected, (path, status, answer)
        return time.perf_counter() - started

    return await asyncio.gather(*(one(*each) for each in zip(raters, paths, strict=True)))


def store_comparison(cluster: Cluster) -> Comparison:
    """Store a comparison all of whose pairs are ready; nobody fetches its videos here."""
    rating = RatingPlan(training=0, gold=0, identical=0)
    mode = {name: Contender(mode=name, model="wan-mini") for name in ("bf16", "w8a8")}
    comparison = Comparison(
        id=new_comparison_id(),
        title="Is w8a8 as good as bf16?",
        owner="bench",
        created_at=datetime.now(UTC),
        reference=mode["bf16"],
        candidate=mode["w8a8"],
        settings=SharedSettings(
            size="96x96", num_frames=17, num_inference_steps=20, guidance_scale=4.0
        ),
        prompts=tuple(
            Prompt(id=str(number), prompt=f"take {number}", negative_prompt="", seeds=(1,))
            for number in range(1, PROMPTS + 1)
        ),
        rating=rating,
        secret="5" * 32,
    )
    pairs = []
    for prompt in comparison.prompts:
        pair = Pair(id=new_pair_id(), number=int(prompt.id), prompt_id=prompt.id, seed=1)
        for arm in Arm:
            shape: dict[str, Any] = {"width": 96, "height": 96, "fps": 8, "num_frames": 17}
            copy = ViewingCopy(key=f"comparisons/{pair.id}-{arm}.mp4", bytes=1000, **shape)
            made = {"copy_": copy, "state": HalfState.SUCCEEDED}
            pair = pair.with_half(arm, pair.half(arm).model_copy(update=made))
        pairs.append(pair)
    ComparisonStore(cluster.redis).create(comparison, pairs)
    return comparison


def join(url: str, token: str) -> str:
    """Open a link; return the cookie of the session."""
    answer = httpx.post(f"{url}/rating/join", json={"token": token})
    assert answer.status_code == 200, answer.text
    return answer.headers["set-cookie"].partition(";")[0]


def percentile_ms(seconds: list[float], percent: int) -> float:
    """Return a percentile in milliseconds."""
    return round(1000 * statistics.quantiles(seconds, n=100)[percent - 1], 2)


CRITERIA = Comparison.model_fields["criteria"].default
VOTE = json.dumps(
    {
        "answers": dict.fromkeys(CRITERIA, "left"),
        "provenance": {
            "seconds_watched": 12.5,
            "frames_seen": [17, 17],
            "replays": 2,
            "viewport": [1280, 720],
            "dropped_frames": 0,
            "speed": 1,
        },
    }
).encode()


if __name__ == "__main__":
    typer.run(main)
