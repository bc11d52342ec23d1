"""`python -m quant`: see `quant.cli`."""

from quant.cli import app

if __name__ == "__main__":
    app(prog_name="python -m quant")
