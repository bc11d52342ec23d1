"""A worker whose engine only waits: `python -m benchmarks.steady_worker SECONDS_PER_STEP`.

It feeds the queue's side of the house at a known rate and leaves the cores to what is measured.
"""

import os
import sys

from tests.worker import pattern_engine


def main() -> None:
    folder = os.environ["ARTIFACTS_URL"].removeprefix("file://")
    sys.argv[1:] = [os.environ["REDIS_URL"], folder, sys.argv[1]]
    pattern_engine.main()


if __name__ == "__main__":
    main()
