"""`python -m mini`."""

from mini.cli import app

if __name__ == "__main__":
    app()
