"""Copy the miniature for one test, and change settings and tensors in the copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from worker.config import WorkerConfig


class EditedModel:
    """A copy of a configuration's model folder that a test may change."""

    def __init__(self, config: WorkerConfig, folder: Path) -> None:
        self.folder = Path(shutil.copytree(config.model.path, folder))
        model = config.model.model_copy(update={"path": self.folder})
        self.config = config.model_copy(update={"model": model})

    def set(self, file: str, **values: object) -> None:
        """Set values in a JSON file."""
        path = self.folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")

    def drop(self, file: str, *names: str) -> None:
        """Leave values out of a JSON file."""
        path = self.folder / file
        values = json.loads(path.read_text())
        left = {name: value for name, value in values.items() if name not in names}
        path.write_text(json.dumps(left), encoding="utf-8")

    def set_scheduler(self, name: str, **values: object) -> None:
        """Replace the scheduler by one of a class of diffusers with these settings."""
        self.set("model_index.json", scheduler=["diffusers", name])
        path = self.folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({"_class_name": name} | values), encoding="utf-8")

    def change(self, part: str, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Replace a tensor of a part by what `change` makes of it."""
        (file,) = (self.folder / part).glob("*.safetensors")
        with safe_open(file, "pt") as opened:
            tensors = {each: opened.get_tensor(each) for each in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        tensors[name] = change(tensors[name])
        save_file(tensors, file, metadata)

    def set_number(self, part: str, name: str, value: float) -> None:
        """Set the first number of a tensor of a part."""

        def set_first(tensor: Tensor) -> Tensor:
            tensor.view(-1)[0] = value
            return tensor

        self.change(part, name, set_first)

    def with_modes(self, *names: str) -> WorkerConfig:
        """Return the configuration with these modes only."""
        modes = tuple(mode for mode in self.config.modes if mode.name in names)
        model = self.config.model.model_copy(update={"default_mode": names[0]})
        return self.config.model_copy(update={"modes": modes, "model": model})

    def with_model(self, **changes: object) -> WorkerConfig:
        """Return the configuration with changes to `[model]`."""
        model = self.config.model.model_copy(update=changes)
        return self.config.model_copy(update={"model": model})
