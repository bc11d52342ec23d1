"""Run the service or one of its commands: `python -m service [run | keys ... | retention]`."""

from service.cli import app

if __name__ == "__main__":
    app(prog_name="python -m service")
