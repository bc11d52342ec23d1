"""Change one line of the product after another, and see whether the tests notice.

`python -m tests.mutants.run [TEXT]` tries the mutants in mutants.toml, or those whose place or
change contains TEXT. It works in a temporary copy of the tree and never in the checkout. First it
runs all the tests it needs once on the copy as it is: a test that fails anyway notices nothing. It
ends with status 1 if a mutant survived.
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

    def mutated(self, text: str) -> str:
        """Return the file's text with the change; raises ValueError if its place is not clear."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.old!r} is {text.count(self.old)} times in {self.file}")
        return text.replace(self.old, self.new)


def read_list(path: Path) -> list[Mutant]:
    """Read a list of mutants; raises ValueError if one does not fit the tree."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    mutants = [Mutant(**each | {"tests": tuple(each["tests"])}) for each in entries]
    for each in mutants:
        each.mutated((ROOT / each.file).read_text(encoding="utf-8"))
        missing = [test for test in each.tests if not (ROOT / test.partition("::")[0]).exists()]
        if missing:
            raise ValueError(f"there is no {', '.join(missing)}, which should notice: {each}")
    return mutants


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
    path.write_text(mutant.mutated(original), encoding="utf-8")
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
        if run_tests(tree, sorted({test for each in mutants for test in each.tests})) != 0:
            sys.exit("the tests fail without any mutant: mend them first")
        for mutant in mutants:
            begun = time.monotonic()
            noticed = is_noticed(tree, mutant)
            survived += not noticed
            outcome = "noticed " if noticed else "SURVIVED"
            print(f"{outcome} {time.monotonic() - begun:5.1f} s  {mutant}", flush=True)  # noqa: T201
    share = 100 * (len(mutants) - survived) / len(mutants)
    print(f"{len(mutants) - survived} of {len(mutants)} noticed: {share:.0f} %")  # noqa: T201
    return survived > 0


if __name__ == "__main__":
    sys.exit(main())
