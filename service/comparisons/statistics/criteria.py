"""Name what raters judge: five dimensions of VBench, and the overall preference.

The names are VBench's (arXiv 2311.17982), so that votes can be put beside its automatic scores. The
definitions say what a person should look at; VBench's own scores come from models.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Criterion:
    """One question to a rater.

    Attributes:
        id: the word in votes, exports and results.
        name: what a rater reads.
        definition: one sentence that says what to look at.
    """

    id: str
    name: str
    definition: str


CRITERIA = (
    Criterion(
        "overall_consistency",
        "Overall consistency",
        "The video shows what the prompt says, in content and in style.",
    ),
    Criterion(
        "subject_consistency",
        "Subject consistency",
        "The subject keeps its look through the whole video.",
    ),
    Criterion(
        "motion_smoothness",
        "Motion smoothness",
        "Movements are smooth and physically plausible, without jumps or flicker.",
    ),
    Criterion(
        "aesthetic_quality",
        "Aesthetic quality",
        "Composition, colours and light are pleasing to look at.",
    ),
    Criterion(
        "imaging_quality",
        "Imaging quality",
        "The picture is free of technical faults such as noise, blur and wrong exposure.",
    ),
)

OVERALL = Criterion(
    "overall",
    "Overall",
    "All things considered, this is the better video for the prompt.",
)

BY_ID = {criterion.id: criterion for criterion in (*CRITERIA, OVERALL)}
