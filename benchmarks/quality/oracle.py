"""Measure the oracle's accuracy on rendered scenes: `python -m benchmarks.quality.oracle`.

The oracle (`mini.world.oracle`) recognizes what a video shows, without seeing its caption. A
rendered scene shows exactly what its caption says. So the oracle must accept every attribute of
the true caption, and reject a caption in which only that attribute was changed.
"""

import random
from dataclasses import replace
from typing import Annotated

import typer

from benchmarks import report
from mini.evaluate import Rate
from mini.world.oracle import ATTRIBUTES, compare, read
from mini.world.render import render_scene
from mini.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    PAIR_MOTIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Split,
    sample_scene,
)


def change_attribute(scene: Scene, attribute: str, rng: random.Random) -> Scene:
    """Change one attribute of a scene; of one random thing, if it is an attribute of things."""
    if attribute in ("shape", "colour", "size"):
        index = rng.randrange(len(scene.things))
        thing = scene.things[index]
        excluded = {getattr(thing, attribute)}
        if attribute == "colour":
            excluded = {other.colour for other in scene.things}
        values = {"shape": list(SHAPES), "colour": list(COLOURS), "size": list(SIZES)}[attribute]
        new = replace(thing, **{attribute: rng.choice([v for v in values if v not in excluded])})
        return replace(
            scene, things=tuple(new if i == index else t for i, t in enumerate(scene.things))
        )
    if attribute == "relation":
        # Either the two things are swapped, or the relation is along the other axis.
        if rng.random() < 0.5:
            return replace(scene, things=scene.things[::-1])
        return replace(scene, relation=next(r for r in RELATIONS if r != scene.relation))
    if attribute == "motion":
        motions = PAIR_MOTIONS if scene.relation else MOTIONS
        return replace(scene, motion=rng.choice([m for m in motions if m != scene.motion]))
    return replace(scene, background=rng.choice([b for b in BACKGROUNDS if b != scene.background]))


def main(
    scenes: Annotated[int, typer.Option(min=1, help="Rendered scenes.")] = 2000,
    seed: int = 0,
) -> None:
    """Measure acceptance of true and rejection of changed captions, per attribute."""
    rng = random.Random(f"oracle {seed}")
    accepted: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    rejected: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for _ in range(scenes):
        scene = sample_scene(rng, rng.choice(list(Split)))
        reading = read(render_scene(scene, rng).numpy())
        for name, verdict in compare(reading, scene).items():
            accepted[name].append(verdict)
            changed = change_attribute(scene, name, rng)
            rejected[name].append(not compare(reading, changed)[name])
    rows = []
    for what, judged in (("true caption accepted", accepted), ("changed rejected", rejected)):
        for name, verdicts in judged.items():
            rate = Rate(sum(verdicts), len(verdicts))
            low, high = rate.interval
            rows.append(
                report.Row(f"{name}, {what}", rate.share, f"of {rate.total}", low=low, high=high)
            )
    report.print_table(rows)
    report.save(report.result("oracle", "cpu", {"scenes": scenes, "seed": seed}, rows))


if __name__ == "__main__":
    typer.run(main)
