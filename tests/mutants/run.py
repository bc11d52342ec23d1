"""Change one line of the product after another, and see whether the tests notice.

`python -m tests.mutants.run [TEXT]` tries the mutants in mutants.toml, or those whose place or
change contains TEXT. It works in a temporary copy of the tree and never in the checkout. Before the
first mutant of a set of tests it runs these on the copy as it is: a test that fails anyway notices
nothing. It ends with status 1 if a mutant survived, or cannot be tried any more.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutants.toml")
NOT_COPIED = "models"  # large, and no test writes into it
LIMIT_S = 600.0
"""A test that runs longer than this has noticed the mutant: it hangs."""
PYTEST_FAILED = 1
"""Pytest's exit status when tests ran and some failed; any other but 0 means that it could not."""


@dataclass(frozen=True)
class Mutant:
    """One change: in `file`, the only occurrence of `old` becomes `new`; `tests` should notice."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old}  →  {new or '(nothing)'}"

    def misfit(self, tree: Path) -> str | None:
        """Return why it cannot be tried on a tree; None if it can."""
        missing = [name for name in (self.file, *self.tests) if not (tree / name).exists()]
        if missing:
            return f"there is no {', '.join(missing)}"
        places = (tree / self.file).read_text(encoding="utf-8").count(self.old)
        return None if places == 1 else f"its line is there {places} times"


def read_list(path: Path) -> list[Mutant]:
    """Read a list of mutants."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**each | {"tests": tuple(each["tests"])}) for each in entries]


@contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    """Copy what git knows or would add; the packages installed beside it are shared."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in filter(None, listed.split("\0")):
            source = ROOT / name
            if name.startswith(f"{NOT_COPIED}/") or source.is_symlink() or not source.is_file():
                continue
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        for name in (NOT_COPIED, ".venv"):
            (Path(folder) / name).symlink_to((ROOT / name).resolve())
        yield Path(folder)


def run_tests(tree: Path, tests: Sequence[str]) -> int | None:
    """Run tests up to the first failure; return pytest's exit status, None if it took too long."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    # Without bytecode: two mutants of one file may have the same size and second.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)  # with the servers and workers that the tests started
            process.wait()


def is_noticed(tree: Path, mutant: Mutant) -> bool:
    """Return whether the mutant's tests fail with it; the copy is restored afterwards."""
    path = tree / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        status = run_tests(tree, mutant.tests)
    finally:
        path.write_text(original, encoding="utf-8")
    if status not in (0, PYTEST_FAILED, None):
        raise RuntimeError(f"pytest ended with status {status}, so no test ran with: {mutant}")
    return status != 0


def main() -> int:
    """Try the chosen mutants and print what became of each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", nargs="?", default="", help="only mutants that contain this")
    text = parser.parse_args().text
    mutants = [each for each in read_list(LIST) if text in str(each)]
    if not mutants:
        sys.exit(f"no mutant contains {text!r}")
    survived = 0
    with copy_of_the_tree() as tree:
        misfits = {each: why for each in mutants if (why := each.misfit(tree)) is not None}
        for mutant, why in misfits.items():
            print(f"OUTDATED  {why}: {mutant}")  # noqa: T201
        mutants = [each for each in mutants if each not in misfits]
        passes: dict[tuple[str, ...], bool] = {}
        for mutant in mutants:
            if mutant.tests not in passes:
                passes[mutant.tests] = run_tests(tree, mutant.tests) == 0
            if not passes[mutant.tests]:
                misfits[mutant] = "its tests fail without it"
                print(f"UNTRIED   {misfits[mutant]}: {mutant}", flush=True)  # noqa: T201
                continue
            begun = time.monotonic()
            noticed = is_noticed(tree, mutant)
            survived += not noticed
            outcome = "noticed " if noticed else "SURVIVED"
            print(f"{outcome} {time.monotonic() - begun:5.1f} s  {mutant}", flush=True)  # noqa: T201
    tried = len(set(mutants) - set(misfits))
    share = 100 * (tried - survived) / max(1, tried)
    print(f"{tried - survived} of {tried} noticed: {share:.0f} %")  # noqa: T201
    return survived > 0 or bool(misfits)


if __name__ == "__main__":
    sys.exit(main())
