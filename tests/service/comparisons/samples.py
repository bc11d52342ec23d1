"""Build comparisons and pairs for tests."""

from datetime import UTC, datetime
from typing import Any

from service.comparisons.model import Comparison, Contender, Pair, Prompt, SharedSettings
from service.comparisons.store import new_comparison_id, new_pair_id


def sample_comparison(
    prompts: int = 2, seeds: tuple[int, ...] = (7,), **changes: Any
) -> Comparison:
    """A comparison of the test offer's `w8a8` with its `bf16`."""
    fields: dict[str, Any] = {
        "id": new_comparison_id(),
        "title": "Is w8a8 as good?",
        "owner": "ops",
        "created_at": datetime(2026, 11, 30, tzinfo=UTC),
        "reference": Contender(mode="bf16", model="wan-mini"),
        "candidate": Contender(mode="w8a8", model="wan-mini"),
        "settings": SharedSettings(
            size="96x96", num_frames=17, num_inference_steps=20, guidance_scale=4.0
        ),
        "prompts": tuple(
            Prompt(id=str(n), prompt=f"a red circle, take {n}", negative_prompt="", seeds=seeds)
            for n in range(1, prompts + 1)
        ),
        "secret": "5" * 32,
    }
    return Comparison(**fields | changes)


def sample_pairs(comparison: Comparison) -> list[Pair]:
    """Its test pairs, as they are when it is created."""
    wanted = [(prompt.id, seed) for prompt in comparison.prompts for seed in prompt.seeds]
    return [
        Pair(id=new_pair_id(), number=number, prompt_id=prompt_id, seed=seed)
        for number, (prompt_id, seed) in enumerate(wanted, 1)
    ]
