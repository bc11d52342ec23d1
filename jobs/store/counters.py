"""What is counted about jobs, and how the counters are laid out in Redis.

The scripts count (`jobs/store/lua/prelude.lua`), so a transition and its count are one step. A
field of the hash `keys.METRICS` reads `name|model|mode|size|frames|guided` and, where more is told
apart, goes on: `ended|…|state|code`, `wait|…|bound` and `wait|…|sum`.
"""

from typing import Final

BOUNDS_S: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200)
"""Upper bounds of the buckets of `wait` (creation to first claim) and `service` (claim of the
attempt that succeeded to its end), in seconds; each bucket counts only what the ones before it do
not hold."""

LABELS: Final = ("model", "mode", "size", "frames", "guided")
"""The parts of a request's shape, which is the beginning of every field's labels."""

COUNTERS: Final = {
    "created": (),
    "claimed": (),
    "lost": (),
    "released": (),
    "ended": ("state", "code"),
    "webhook": ("outcome",),
}
"""Each counter and its labels beyond those of the shape. The outcome of a call of a webhook is
`delivered`, `retried` (failed, and to be repeated) or `given_up`."""

HISTOGRAMS: Final = ("wait", "service")
