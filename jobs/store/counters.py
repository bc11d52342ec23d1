"""Define the counters of jobs and their layout in Redis.

The Lua scripts increment them (`jobs/store/lua/prelude.lua`), so a transition and its count are one
atomic step. A field of the hash `redis_keys.METRICS` is named `name|model|mode|size|frames|guided`,
followed by further labels where there are any: `ended|…|state|code`, `wait|…|bound`, `wait|…|sum`.

The scripts also keep a series by the minute, without shapes. A field of the hash
`redis_keys.series(hour)` is named `minute|mode|what`. `what` is a final state, whose value is the
number of jobs that ended so; or one of HISTOGRAMS, whose value is the number of observations; or
that name with `_s`, whose value is the sum of their seconds.
"""

from typing import Final

BOUNDS_S: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200)
"""Upper bounds of the histogram buckets, in seconds.

Each bucket counts only what lies above the bound before it: the buckets are not cumulative.
"""

LABELS: Final = ("model", "mode", "size", "frames", "guided")
"""The parts of a request's shape, which are the first labels of every field."""

COUNTERS: Final = {
    "created": (),
    "claimed": (),
    "lost": (),
    "released": (),
    "returned": (),
    "ended": ("state", "code"),
    "webhook": ("outcome",),
}
"""Each counter and its labels beyond those of the shape.

The outcome of a webhook call is `delivered`, `retried` (failed, and to be repeated) or `given_up`.
"""

HISTOGRAMS: Final = ("wait", "service")
"""`wait`: from creation to the first claim; `service`: from the claim that succeeded to the end."""
