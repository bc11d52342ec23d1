"""Write a pipeline's folder with another transformer; its other components are linked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quant.errors import StudyError
from quant.weights.model_folder import COMPONENTS
from quant.weights.new_folder import check_new_folder, new_folder, sync


def write_with_transformer(model: Path, transformer: Any, out: Path) -> None:
    """Write a folder like `model` with another transformer; the other components are linked.

    Raises:
        StudyError: the folder cannot be written.
        WeightsError: it exists already.
    """
    check_new_folder(out)
    try:
        with new_folder(out) as folder:
            shutil.copy2(model / "model_index.json", folder)
            for component in COMPONENTS:
                if component != "transformer":
                    shutil.copytree(
                        model / component, folder / component, copy_function=_link_or_copy
                    )
            transformer.save_pretrained(folder / "transformer")
            _sync_all([folder / "model_index.json", *(folder / "transformer").iterdir()])
    except OSError as error:
        raise StudyError(f"cannot write {out}: {error.strerror or error}") from error


def _link_or_copy(source: str, target: str) -> None:
    """Link a file; copy it where the folders are on different disks."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        sync(Path(target))


def _sync_all(files: Sequence[Path]) -> None:
    for file in files:
        sync(file)
