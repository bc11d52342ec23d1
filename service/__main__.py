"""`python -m service` runs the service; `keys ...` and `retention` after it are its commands."""

from service.cli import app

if __name__ == "__main__":
    app(prog_name="python -m service")
