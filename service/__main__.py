"""`python -m service` runs the service; `python -m service keys ...` manages its keys."""

from service.cli import app

if __name__ == "__main__":
    app(prog_name="python -m service")
