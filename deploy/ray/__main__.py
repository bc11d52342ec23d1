"""Run workers on a Ray cluster: `python -m deploy.ray up|status|down`."""

from deploy.ray.cli import app

if __name__ == "__main__":
    app(prog_name="python -m deploy.ray")
