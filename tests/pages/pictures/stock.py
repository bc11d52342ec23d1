"""Fill a service with what its pages show: jobs of every end, a comparison, a rater who has voted.

Everything goes through the public API, and the miniature makes the videos.
"""

from __future__ import annotations

import random
import time
from typing import Any

import httpx

from deploy.local.waiting import wait_until

PROMPTS = (
    "a small red circle moving right on a black background",
    "a large blue square moving left on a white background",
)
SMALL = {"num_frames": 9, "num_inference_steps": 6}
MADE_WITHIN_S = 600.0
ENDED = ("succeeded", "failed", "cancelled")
SEEN = {"seconds_watched": 4.0, "frames_seen": [9, 9], "replays": 1, "speed": 1.0}


class Stock:
    """What a service was filled with.

    Attributes:
        names: what the paths of scenes refer to: `job`, `cancelled`, `comparison`, `rater`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.names: dict[str, str] = {}
        self.api = httpx.Client(base_url=url, timeout=60)

    def fill(self) -> None:
        """Make everything; takes minutes, since real videos are made."""
        jobs = [
            self.ask(prompt=PROMPTS[0], mode=mode, seed=7, **SMALL) for mode in ("bf16", "w8a8")
        ]
        self.names["job"] = jobs[0]
        self.names["cancelled"] = self.ask(prompt=PROMPTS[1], num_inference_steps=50)
        self.api.delete(f"/jobs/{self.names['cancelled']}").raise_for_status()
        self.fill_comparison()
        wait_until(lambda: all(self.state(job) in ENDED for job in jobs), MADE_WITHIN_S)

    def fill_comparison(self) -> None:
        """Make a comparison whose pairs are ready, rate it, and invite another rater."""
        made = self.post(
            "/comparisons",
            title="Is W8A8 as good as BF16?",
            reference={"mode": "bf16"},
            candidate={"mode": "w8a8"},
            prompts=list(PROMPTS),
            settings=SMALL,
            rating={"training": 1, "repeat_share": 0.5, "identical": 1, "gold": 1},
        )
        self.names["comparison"] = made["id"]
        path = f"/comparisons/{made['id']}"

        def is_ready() -> bool:
            counts = self.api.get(path).raise_for_status().json()["counts"]
            return bool(counts["ready"] + counts["failed"] == counts["pairs"])

        wait_until(is_ready, MADE_WITHIN_S, "all pairs are ready", every_s=1)
        self.rate(self.invite("Ada"))
        self.names["rater"] = self.invite("Grace")

    def invite(self, name: str) -> str:
        """Return the token of a new rater's link."""
        made = self.post(f"/comparisons/{self.names['comparison']}/raters", name=name)
        return str(made["url"]).partition("#")[2]

    def rate(self, token: str) -> None:
        """Answer everything that a rater is shown, in some way."""
        chance = random.Random(1)
        with httpx.Client(base_url=self.url, timeout=60, headers={"Origin": self.url}) as rater:
            rater.post("/rating/join", json={"token": token}).raise_for_status()
            criteria = rater.get("/rating").raise_for_status().json()["comparison"]["criteria"]
            while True:
                item = rater.get("/rating/next").raise_for_status()
                if item.status_code == httpx.codes.NO_CONTENT:
                    if not rater.get("/rating").raise_for_status().json()["progress"]["waiting"]:
                        return
                    time.sleep(1)  # more pairs are being made
                    continue
                answers = {each["id"]: chance.choice(("left", "right", "tie")) for each in criteria}
                rater.post(
                    f"/rating/items/{item.json()['item']}/vote",
                    json={"answers": answers, "provenance": SEEN},
                ).raise_for_status()

    def ask(self, **request: Any) -> str:
        """Ask for a video; return the job's id."""
        return str(self.post("/generate", **request)["id"])

    def state(self, job: str) -> str:
        """The state of a job."""
        return str(self.api.get(f"/jobs/{job}").raise_for_status().json()["state"])

    def post(self, path: str, **body: Any) -> Any:
        """Return the JSON of what was made."""
        return self.api.post(path, json=body).raise_for_status().json()
