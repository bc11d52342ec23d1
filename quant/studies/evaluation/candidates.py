"""Name what is evaluated: a scales file with its recipe, or a packed checkpoint; beside BF16."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant.calibration.scales import Scales, check_scales, load_scales
from quant.errors import StudyError
from quant.kernels.eager import EagerKernels
from quant.packed.load import PackedCheckpoint, check_packed, load_packed_shared, open_packed
from quant.recipe.recipe import QuantRecipe
from quant.transformer.attention.apply import apply_attention
from quant.transformer.fuse import attention_scales, fuse_quantized
from quant.transformer.module_tree import share_tree
from quant.transformer.quantize import quantize_transformer
from quant.weights.reader import TensorReader

BF16 = "bf16"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A quantized transformer to be.

    Attributes:
        source: its scales file or packed folder.
        recipe: of the scales; of a packed checkpoint, its own, which may have sparse attention
            although its scales are of the dense recipe.
        packed: the checkpoint, if it is one.
    """

    name: str
    source: Path
    scales: Scales
    recipe: QuantRecipe
    packed: PackedCheckpoint | None = None

    @classmethod
    def read(cls, text: str, model: Path, fingerprint: str) -> Candidate:
        """Read "NAME=PATH", or "PATH", which is then named after its file.

        Args:
            model: the folder it is to be used with.
            fingerprint: of that model.

        Raises:
            StudyError: the name is not one.
            QuantError: the path holds neither scales nor a packed checkpoint of this model.
        """
        name, found, path = text.partition("=")
        source = Path(path if found else text)
        name = name if found else source.stem
        if not _NAME.fullmatch(name) or name == BF16:
            raise StudyError(
                f"{name!r} cannot name a candidate: give NAME=PATH with letters, digits, '.', '_' "
                f"and '-', and another name than {BF16!r}"
            )
        if source.is_dir():
            packed = open_packed(source, model_folder=model)
            recipe = check_packed(
                packed,
                model_fingerprint=fingerprint,
                recipe=packed.info.recipe,
                model_folder=model,
            )
            return cls(name, source, packed.scales, recipe, packed)
        scales = load_scales(source, model_folder=model)
        check_scales(
            scales,
            model_fingerprint=fingerprint,
            recipe=scales.recipe,
            path=source,
            model_folder=model,
        )
        return cls(name, source, scales, scales.recipe)

    def check_attention(self, steps: int, points: Path | None) -> None:
        """Refuse a study in which FP8 or sparse attention would be judged as if it were exact.

        Args:
            steps: of each video.
            points: the folder of points for the velocity error, if it is asked for.

        Raises:
            StudyError: no step would have it, or the velocity error of sparse attention is asked
                for.
        """
        exact = self.recipe.exact_attention_steps
        if steps <= exact:
            raise StudyError(
                f"{self.name} has {self.recipe.attention} attention after the first {exact} steps, "
                f"and with {steps} steps none would have it: give --steps {exact + 1} or more, or "
                "leave it out"
            )
        if self.recipe.sparse is not None and points is not None:
            raise StudyError(
                f"{self.name} has sparse attention, whose loss the velocity error at {points} does "
                "not have: leave out --points, or this candidate"
            )

    @property
    def identity(self) -> str:
        """Return what its results depend on: the recipe and every scale."""
        digest = hashlib.sha256()
        for kind in ("weight_scale", "act_scale", "attention_scale"):
            for linear, scale in sorted(getattr(self.scales, kind).items()):
                digest.update(f"{kind} {linear}\n".encode())
                digest.update(scale.contiguous().numpy().tobytes())
        kind = "packed" if self.packed else "scales"
        return f"{self.recipe.fingerprint} {kind} {digest.hexdigest()}"

    def build(self, transformer: Any) -> Any:
        """Build the quantized transformer on eager kernels; it shares what stays in BF16.

        Args:
            transformer: in BF16 on its device, without hooks.

        Raises:
            QuantError: it cannot be built.
        """
        if self.packed is not None:
            device = next(transformer.parameters()).device
            built = load_packed_shared(self.packed, transformer, TensorReader(device))
        else:
            built, _ = quantize_transformer(transformer, self.recipe, self.scales)
        fuse_quantized(built, EagerKernels(), attention_scales(self.recipe, self.scales))
        apply_attention(built, self.recipe)
        return built.eval()


def read_candidates(texts: Sequence[str], model: Path, fingerprint: str) -> list[Candidate]:
    """Read all candidates.

    Raises:
        StudyError: there are none, or two have one name.
        QuantError: one of them cannot be read or is of another model.
    """
    found = [Candidate.read(text, model, fingerprint) for text in texts]
    names = [each.name for each in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice or not found:
        raise StudyError(
            f"two candidates are named {twice[0]!r}: give each a name of its own, NAME=PATH"
            if twice
            else "there is nothing to evaluate: give --candidate NAME=PATH"
        )
    return found


def build_bf16(transformer: Any) -> Any:
    """Return the transformer in BF16 as a worker runs it, on the same kernels as the candidates."""
    shared = share_tree(transformer, lambda _name, _module: None)
    with torch.no_grad():
        fuse_quantized(shared, EagerKernels(), {})
    return shared.eval()
