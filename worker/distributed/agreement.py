"""Refuse ranks that would run a mode differently: their parts of one job would not match.

What the ranks are about to load is compared before weights are read, and their kernels before
tensors are exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quant.packed.convert import file_sha256
from worker.distributed.rank_group import RankGroup
from worker.errors import RanksDiffer
from worker.model_loader.loader import Mode
from worker.model_loader.mode_plan import ModePlan

_DIGITS = 12  # of a hash, enough to tell two apart


@dataclass(frozen=True, slots=True)
class LoadedParts:
    """What decides a mode's weights and steps besides the model, by names for operators.

    Attributes:
        parts: of each part its content's identity, which is compared, and where it comes from;
            nowhere if the identity is the content itself.
    """

    mode: str
    parts: dict[str, tuple[str | None, str]]

    @classmethod
    def of(cls, plan: ModePlan) -> LoadedParts:
        """Identify the parts of a planned mode by their content."""
        config, loras, recipe = plan.config, plan.loras, plan.recipe
        scales, source = None, ""
        if plan.packed is not None:
            scales, source = plan.packed.info.scales_sha256, str(config.packed)
        elif config.scales is not None:
            scales, source = file_sha256(config.scales), str(config.scales)
        return cls(
            config.name,
            {
                "LoRAs": (loras.digest, ", ".join(loras.arguments)),
                "recipe": (None if recipe is None else recipe.fingerprint, str(config.recipe)),
                "scales": (scales, source),
                "settings": (config.variant, ""),
            },
        )


def check_same_plans(ranks: RankGroup, plans: Sequence[ModePlan]) -> None:
    """Compare what the ranks are about to load; all ranks must call this.

    Raises:
        RanksDiffer: names the first mode, part and rank that differ from the leader's.
        RanksLost: another rank has failed before.
    """
    gathered = ranks.all_gather([LoadedParts.of(plan) for plan in plans])
    for rank, modes in enumerate(gathered):
        names, leader_names = ([each.mode for each in own] for own in (modes, gathered[0]))
        if names != leader_names:
            raise RanksDiffer(
                f"Rank {rank} has the modes {', '.join(names)} and rank 0 "
                f"{', '.join(leader_names)}: give every rank the same configuration."
            )
        for mode, leader in zip(modes, gathered[0], strict=True):
            for part, found in mode.parts.items():
                if found[0] != leader.parts[part][0]:
                    raise RanksDiffer(
                        f"Mode {mode.mode!r} has {_shown(part, found)} on rank {rank} and "
                        f"{_shown(part, leader.parts[part])} on rank 0: give every rank the same "
                        "configuration and the same files."
                    )


def _shown(part: str, found: tuple[str | None, str]) -> str:
    content, source = found
    if content is None:
        return f"no {part}"
    if not source:  # it is no hash
        return f"the {part} {content}"
    return f"the {part} {content.rpartition(':')[2][:_DIGITS]} ({source})"


def check_same_kernels(ranks: RankGroup, modes: Sequence[Mode]) -> None:
    """Compare the ranks' kernels, by which tensors would not match; all ranks must call this.

    Raises:
        RanksDiffer: names the first such mode and rank, with that rank's or the leader's warning.
        RanksLost: another rank has failed before.
    """
    offers = [mode.offer for mode in modes]
    gathered = ranks.all_gather([(each.name, each.kernels, each.warning) for each in offers])
    for rank, found in enumerate(gathered):
        for (name, kernels, warning), (_, leader_kernels, leader_warning) in zip(
            found, gathered[0], strict=True
        ):
            if kernels != leader_kernels:
                reason = warning or leader_warning or "the devices are not alike."
                raise RanksDiffer(
                    f"Mode {name!r} runs on {kernels} kernels on rank {rank} and on "
                    f"{leader_kernels} on rank 0: {reason} Give the worker devices of one kind, "
                    "on which the same libraries run."
                )
