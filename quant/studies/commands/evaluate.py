"""Define `python -m quant evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from quant.calibration import sampler_options as options
from quant.calibration.prompts import PromptSet
from quant.calibration.sampler_options import sampler_of
from quant.calibration.sampling import check_prompt_lengths, load_pipeline, load_tokenizer
from quant.console import errors_as_sentences, resumable
from quant.errors import StudyError
from quant.studies.commands.options import Device, Model, Out
from quant.studies.evaluation.candidates import BF16, Candidate, build_bf16, read_candidates
from quant.studies.evaluation.gate import broken_bounds, read_gate
from quant.studies.evaluation.generate import Plan, generate_videos
from quant.studies.evaluation.judges.catalog import DEFAULT, build_judges
from quant.studies.evaluation.judges.interface import Judge
from quant.studies.evaluation.measures import (
    VELOCITY,
    Measure,
    judge_videos,
    measure_velocity,
    velocity_passes,
)
from quant.studies.evaluation.report import report
from quant.studies.evaluation.unseen import check_unseen
from quant.studies.evaluation.verdict import compare, diverged
from quant.studies.output.study_folder import StudyFolder
from quant.studies.points import PointsFolder, open_points
from quant.studies.progress import study_progress
from quant.transformer.lora.merge import read_loras
from quant.transformer.lora.source import Loras, LoraSource
from quant.transformer.pipeline_weights import check_pipeline_weights
from quant.weights.fingerprint import model_fingerprint
from quant.weights.model_folder import check_model_kind

GATE_FAILED = 3


@dataclass(frozen=True, slots=True)
class _Study:
    """All that an evaluation is made of."""

    plan: Plan
    candidates: list[Candidate]
    judges: list[Judge]
    points: PointsFolder | None

    def open(self, out: Path, fingerprint: str, device: str) -> StudyFolder:
        """Make the study's folder, or go on with it.

        Judges are not part of what it is: one that fails may be left out, and the videos stay.
        """
        recorded = self.points and json.dumps(asdict(self.points.info), sort_keys=True)
        return StudyFolder.open(
            out,
            "evaluate",
            {
                "model": fingerprint,
                "set of candidates": json.dumps({c.name: c.identity for c in self.candidates}),
                "set of prompts": json.dumps(self.plan.prompts.prompts),
                "sampler": json.dumps(asdict(self.plan.sampler), sort_keys=True),
                "number of videos per prompt": str(self.plan.draws),
                "number of videos in a batch": str(self.plan.batch),
                "set of points": recorded or "none",
                "device": device,
            },
        )

    @property
    def cost(self) -> tuple[int, str]:
        """Return how many steps the bar has, and what they are in words."""
        videos = self.plan.videos * (1 + len(self.candidates))
        passes = videos * self.plan.passes
        scores = sum(
            self.plan.videos * (len(self.candidates) + (judge.needs == "video"))
            for judge in self.judges
        )
        width, height = self.plan.sampler.size
        gib = videos * self.plan.sampler.num_frames * width * height * 3 / 2**30
        words = (
            f"{videos:,} videos of at most {gib:.1f} GiB together, {passes:,} passes of the "
            f"transformer; {scores:,} scores"
        )
        if self.points is not None:
            each = velocity_passes(self.points, self.candidates)
            more = each * len(self.points.info.prompts)
            return passes + scores + more, f"{words}; {more:,} passes for the velocity error"
        return passes + scores, words

    def run(self, load: Callable[[], Any], folder: StudyFolder) -> list[Measure]:
        """Say the cost, load the pipeline, and make and judge what an earlier run has not."""
        total, words = self.cost
        builders = {BF16: build_bf16} | {each.name: each.build for each in self.candidates}
        names = [each.name for each in self.candidates]
        with study_progress(words, total) as progress:
            pipe = load()
            generate_videos(pipe, self.plan, builders, folder, progress)
            measures = judge_videos(self.plan, names, self.judges, folder, progress)
            if self.points is not None:
                measures.append(
                    measure_velocity(
                        pipe.transformer, self.candidates, self.points, folder, progress
                    )
                )
        return measures


def evaluate_command(  # noqa: PLR0913, PLR0917 (typer derives the command line from it)
    model: Model,
    candidate: Annotated[
        list[str], typer.Option(help="NAME=PATH of a scales file or a packed folder; repeatable.")
    ],
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line, UTF-8.")],
    out: Out,
    seeds: Annotated[int, typer.Option(min=1, help="Videos of each prompt.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Videos that are denoised together.")] = 1,
    judge: Annotated[
        list[str],
        typer.Option(
            help="latent-sqnr, psnr, ssim, vmaf, xpsnr, st-lpips, temporal-flickering, vbench, or "
            "module:name of one's own; repeatable."
        ),
    ] = list(DEFAULT),  # noqa: B006 (typer copies it)
    points: Annotated[
        Path | None, typer.Option(help="Folder of `record`: adds the velocity error there.")
    ] = None,
    calibration_prompts: Annotated[
        list[Path], typer.Option(help="Prompts of a calibration, if they are not found.")
    ] = [],  # noqa: B006
    analysis: Annotated[
        list[Path], typer.Option(help="Folder of an `analyze` that chose a recipe.")
    ] = [],  # noqa: B006
    gate: Annotated[
        Path | None, typer.Option(help="TOML of bounds; exits with 3 if one is not kept.")
    ] = None,
    vbench_python: Annotated[Path | None, typer.Option(help="Python that has vbench.")] = None,
    vbench_weights: Annotated[Path | None, typer.Option(help="VBench's folder of weights.")] = None,
    vbench_dimension: Annotated[
        list[str], typer.Option(help="One of VBench's; repeatable. Default: the paper's five.")
    ] = [],  # noqa: B006
    config: options.Config = None,
    steps: options.Steps = None,
    size: options.Size = None,
    frames: options.Frames = None,
    guidance_scale: options.GuidanceScale = None,
    text_tokens: options.TextTokens = None,
    negative_prompt: options.NegativePrompt = None,
    flow_shift: options.FlowShift = None,
    seed: options.Seed = None,
    lora: Loras = [],  # noqa: B006
    device: Device = "cpu",
) -> None:
    """Make videos of PROMPTS in BF16 and by every candidate, and let judges compare them.

    OUT gets the videos, results.json, tables, figures and index.html. Prompts that a candidate was
    calibrated on are refused. After Ctrl-C or a fault the same command goes on.
    """
    with errors_as_sentences():
        check_model_kind(model)
        loras = read_loras(model, map(LoraSource.parse, lora))
        fingerprint = loras.fingerprint(model_fingerprint(model))
        sampler = sampler_of(
            model,
            config,
            size=size,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            text_tokens=text_tokens,
            negative_prompt=negative_prompt,
            flow_shift=flow_shift,
            seed=seed,
            timestep_groups=1,  # of calibration; it says nothing here
        )
        plan = Plan(PromptSet.read(prompts), sampler, seeds, batch)
        check_prompt_lengths(load_tokenizer(model), plan.prompts.prompts, sampler)
        candidates = read_candidates(candidate, model, fingerprint)
        for read in candidates:
            read.check_attention(sampler.num_inference_steps, points)
        check_unseen(plan.prompts, candidates, model, calibration_prompts, analysis)
        judges = build_judges(judge, vbench_dimension, vbench_python, vbench_weights, device)
        recorded = _points(points, fingerprint)
        if recorded:
            known = PromptSet(recorded.info.prompts, f"{points}")
            check_unseen(known, candidates, model, calibration_prompts, analysis)
        needs: dict[str, str] = {each.name: each.needs for each in judges}
        bounds = gate and read_gate(gate, needs | ({VELOCITY: "video"} if recorded else {}))
        check_pipeline_weights(model)
        study = _Study(plan, candidates, judges, recorded)
        folder = study.open(out, fingerprint, device)

        def load() -> Any:
            pipe = load_pipeline(model, device)
            loras.merge(pipe.transformer)
            return pipe

        with resumable():
            measures = study.run(load, folder)
        comparisons, far = compare(measures), diverged(measures)
        names = (BF16, *(each.name for each in candidates))
        videos = {name: plan.of_candidate(out, name) for name in names}
        made = report(plan, candidates, measures, comparisons, far, videos)
        broken = broken_bounds(bounds, measures, comparisons, far) if bounds else []
        made[0]["gate"] = None if not bounds else {"bounds": bounds, "broken": broken}
        folder.finish(*made)
    for each in comparisons:
        typer.echo(each.words())
    typer.echo(f"wrote {out}: see {out / 'index.html'}")
    for words in broken:
        typer.echo(f"gate: {words}", err=True)
    if broken:
        raise typer.Exit(GATE_FAILED)


def _points(path: Path | None, fingerprint: str) -> PointsFolder | None:
    if path is None:
        return None
    found = open_points(path)
    found.check_model(fingerprint)
    if len(found.info.prompts) < 2:
        raise StudyError(f"{path} has points of one prompt: an interval needs at least two")
    return found
