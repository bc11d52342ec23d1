"""`python -m mini distill` with a tiny random Wan: quality is not tested, all else is."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors import safe_open
from typer.testing import CliRunner, Result

from mini.architecture import (
    FLOW_SHIFT,
    LATENT_CHANNELS,
    TEXT_TOKENS,
    TEXT_WIDTH,
    build_text_encoder,
    build_tokenizer,
)
from mini.cli import app
from mini.distillation.adapters import Adapters, block_linears, merge_file
from mini.distillation.progress import Progress
from mini.distillation.run import LORA_FILE, Distillation
from mini.distillation.schedule import Schedule, euler_scheduler
from mini.distillation.settings import DistillSettings
from mini.distillation.training import Training
from mini.distillation.trajectories import Recorder, Trajectories, velocity
from mini.evaluate import load_pipeline
from mini.world.scenes import EXAMPLE, Split, captions_of, plain_caption
from worker.model_loader.scheduler import mode_scheduler

SETTINGS = DistillSettings(
    steps=8, batch=2, rounds=2, trajectories=3, teacher_steps=1, rank=2, learning_rate=1e-2
)
CPU = torch.device("cpu")
MINIATURE = Path(__file__).parents[3] / "models" / "wan-mini"
CONFIG = UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
).config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a pipeline with the miniature's latents and two small blocks."""
    folder = tmp_path_factory.mktemp("distillation") / "model"
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
    )
    vae = AutoencoderKLWan(base_dim=4, z_dim=LATENT_CHANNELS, num_res_blocks=1)
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)  # the oracle is slow with noise
    WanPipeline(
        tokenizer=build_tokenizer(captions_of(Split.TRAIN, 50)),
        text_encoder=build_text_encoder().bfloat16(),
        transformer=transformer.bfloat16(),
        vae=vae,
        scheduler=UniPCMultistepScheduler.from_config(CONFIG),
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def transformer(model: Path) -> WanTransformer3DModel:
    return load_pipeline(model, "cpu").transformer.float()


def distill(model: Path, folder: Path, *options: str) -> Result:
    """Run the command with SETTINGS."""
    values = {
        "--model": model,
        "--out": folder / "out",
        "--work": folder / "work",
        "--device": "cpu",
        "--steps": SETTINGS.steps,
        "--batch": SETTINGS.batch,
        "--rounds": SETTINGS.rounds,
        "--trajectories": SETTINGS.trajectories,
        "--teacher-steps": SETTINGS.teacher_steps,
        "--rank": SETTINGS.rank,
        "--learning-rate": SETTINGS.learning_rate,
        "--evaluate": 1,
    }
    arguments = [str(each) for pair in values.items() for each in pair]
    return CliRunner().invoke(app, ["distill", *arguments, *options])


class Interrupted(Exception):
    """What ends a run in the middle."""


class Interrupting(Progress):
    """Ends the run after some reports."""

    def __init__(self, after: int) -> None:
        super().__init__(1)
        self.left = after

    def advance(self, what: str, passes: int) -> None:
        self.left -= 1
        if not self.left:
            raise Interrupted
        super().advance(what, passes)


def test_it_trains_and_judges_and_an_interrupted_run_ends_with_the_same_bytes(
    model: Path, tmp_path: Path
) -> None:
    result = distill(model, tmp_path)
    assert result.exit_code == 0, result.output
    # 2 rounds of 3 trajectories of 4 segments, of 4 guided and 1 own pass each; backward counts 2.
    assert "120 to record, 48 to train, 48 to judge 1 captions" in result.output
    out = tmp_path / "out"
    lora = (out / LORA_FILE).read_bytes()
    with safe_open(out / LORA_FILE, "pt") as file:
        names = set(file.keys())
    own = {name for name, _ in block_linears(load_pipeline(model, "cpu").transformer)}
    assert len(own) == 20
    layers = ("lora_A", "lora_B")
    assert names == {f"transformer.{name}.{layer}.weight" for name in own for layer in layers}
    figures = json.loads((out / "distill.json").read_text())
    assert [step for step, _ in figures["losses"]] == [4, 8]
    assert [len(row) for row in figures["errors_of_rounds"]] == [4, 4]
    assert set(figures["oracle"]) == {"teacher", "few steps, no LoRA", "few steps, LoRA"}
    assert "| shape, of 1 |" in (out / "README.md").read_text()
    assert (out / "contact-sheet.png").exists()

    work = tmp_path / "interrupted"
    for after in (1, 3, 5, 3):  # in both rounds, while recording and while training
        with pytest.raises(Interrupted):
            Distillation(model, work, SETTINGS, "cpu").run(Interrupting(after))
        assert not (work / LORA_FILE).exists()
    run = Distillation(model, work, SETTINGS, "cpu")
    run.run(Progress(1))
    assert run.lora.read_bytes() == lora
    assert run.errors == figures["errors_of_rounds"]

    again = distill(model, tmp_path)
    assert again.exit_code == 1
    assert "out exists already: name another folder, or remove it" in again.output


def test_diffusers_reads_the_file_and_it_is_what_was_trained(
    model: Path, transformer: WanTransformer3DModel, tmp_path: Path
) -> None:
    adapters = Adapters(transformer, rank=2, seed=1)
    with torch.no_grad():
        for each in adapters.trained.parameters():
            each.copy_(torch.randn_like(each).mul(0.2).half())
    adapters.save(tmp_path / LORA_FILE)
    inputs = (
        torch.randn(1, LATENT_CHANNELS, 1, 4, 4),
        torch.tensor([500.0]),
        torch.randn(1, 3, TEXT_WIDTH),
    )
    trained = velocity(transformer, *inputs, adapters.merged())
    plain = velocity(transformer, *inputs, {})

    pipeline = load_pipeline(model, "cpu")
    merge_file(pipeline.transformer, tmp_path / LORA_FILE)
    for name, weight in adapters.merged().items():
        assert torch.equal(pipeline.transformer.get_parameter(name).float(), weight), name

    pipeline = load_pipeline(model, "cpu")
    pipeline.transformer.float()
    pipeline.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    with torch.no_grad():
        read = pipeline.transformer(*inputs, return_dict=False)[0]
    assert (trained - plain).norm() > 0.1 * plain.norm()
    assert (trained - read).norm() < 0.02 * (trained - plain).norm()  # BF16 rounds the sum


def test_the_student_s_scheduler_makes_euler_steps_at_shifted_even_times() -> None:
    schedule = Schedule(CONFIG, 4, CPU)
    assert schedule.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert schedule.timesteps.tolist() == pytest.approx([1000, 900, 750, 500])
    assert schedule.between(1, 0.0) == pytest.approx(schedule.sigmas[1].item())
    assert schedule.between(3, 1.0) == 0
    # Halfway in time between 0.75 (0.5 before the shift) and 0.5 (0.25).
    assert schedule.between(2, 0.5) == pytest.approx(3 * 0.375 / (1 + 2 * 0.375))

    scheduler = euler_scheduler(CONFIG)
    scheduler.set_timesteps(4)
    latents = expected = torch.randn(1, 2)
    for step, timestep in enumerate(scheduler.timesteps):
        own = torch.randn(1, 2)
        latents = scheduler.step(own, timestep, latents, return_dict=False)[0]
        expected = expected + schedule.length(step) * own
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_the_student_is_trained_and_judged_on_the_levels_of_a_worker_s_euler(steps: int) -> None:
    own = UniPCMultistepScheduler.from_pretrained(MINIATURE / "scheduler")
    served = mode_scheduler(own, "euler")
    served.set_timesteps(steps)
    schedule = Schedule(own.config, steps, CPU)
    judged = euler_scheduler(own.config)
    judged.set_timesteps(steps)
    for found in (schedule, judged):
        assert torch.equal(found.sigmas, served.sigmas)
        assert torch.equal(found.timesteps, served.timesteps)


@pytest.mark.parametrize("follow_student", [False, True])
def test_targets_lead_where_the_guided_teacher_goes(
    transformer: WanTransformer3DModel, follow_student: bool
) -> None:
    schedule = Schedule(CONFIG, 2, CPU)
    empty, text = torch.randn(1, 3, TEXT_WIDTH), torch.randn(2, 3, TEXT_WIDTH)
    noise = torch.randn(2, LATENT_CHANNELS, 1, 4, 4)
    recorder = Recorder(transformer, schedule, 3.0, 1, empty)
    found = recorder.record(noise, text, {}, follow_student=follow_student)

    def guided(latents: torch.Tensor, sigma: float) -> torch.Tensor:
        timestep = torch.full((2,), 1000 * sigma)
        without = velocity(transformer, latents, timestep, empty.expand_as(text), {})
        return without + 3.0 * (velocity(transformer, latents, timestep, text, {}) - without)

    first, second = schedule.sigmas[:2].tolist()
    middle = schedule.between(0, 0.5)
    with torch.no_grad():
        halfway = noise + (middle - first) * guided(noise, first)
        target = (second - first) * guided(halfway, middle) / (second - first)
        own = velocity(transformer, noise, schedule.timesteps[:1].expand(2), text, {})
    torch.testing.assert_close(found.targets[:, 0].float(), target, rtol=2e-3, atol=2e-3)
    step = own if follow_student else target
    expected = noise + (second - first) * step
    torch.testing.assert_close(found.states[:, 1].float(), expected, rtol=2e-3, atol=2e-3)
    error = (own - target).square().sum((1, 2, 3, 4)) / target.square().sum((1, 2, 3, 4))
    torch.testing.assert_close(found.errors[:, 0], error)


def test_the_student_learns_what_the_guided_teacher_does(
    transformer: WanTransformer3DModel, tmp_path: Path
) -> None:
    schedule = Schedule(CONFIG, 2, CPU)
    recorder = Recorder(transformer, schedule, 4.0, 1, torch.zeros(1, 3, TEXT_WIDTH))
    noise = torch.randn(4, LATENT_CHANNELS, 1, 4, 4)
    text = torch.randn(4, 3, TEXT_WIDTH)
    recorded = recorder.record(noise, text, {}, follow_student=False)
    training = Training(transformer, schedule, replace(SETTINGS, steps=60, batch=8))
    while training.done < 60:
        training.step(recorded)
        if training.done % 20 == 0:
            training.save(tmp_path / "state.pt")
    losses = [loss for _, loss in training.losses]
    assert losses[2] < 0.5 * losses[0]
    later = recorder.record(noise, text, training.adapters.merged(), follow_student=False)
    assert (later.errors < recorded.errors).all()


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        (["--model", "absent"], "", "absent is no folder of a WanPipeline"),
        (["--rank", "3000"], "", "choose a lower --rank, or the miniature"),
        (["--steps", "1"], "", "1 steps are fewer than 2 rounds"),
        ([], "a red elephant", "'a red elephant' is not a caption of the miniature's world"),
        ([], captions_of(Split.EVALUATION, 1)[0], "shows a scene of the evaluation"),
        ([], " ", "is not a caption"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    model: Path, tmp_path: Path, options: list[str], text: str, message: str
) -> None:
    if text:
        (tmp_path / "captions.txt").write_text(f"{plain_caption(EXAMPLE)}\n{text}\n")
        options = ["--captions", str(tmp_path / "captions.txt")]
    result = distill(model, tmp_path, *options)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a red \xff circle\n", "is not UTF-8 (byte 6 is 0xff): save it as UTF-8"),
        (b"\xef\xbb\xbfa red elephant\n", "'a red elephant' is not a caption"),
    ],
)
def test_a_file_of_captions_may_begin_with_a_mark_and_has_to_be_utf_8(
    model: Path, tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "captions.txt").write_bytes(data)
    result = distill(model, tmp_path, "--captions", str(tmp_path / "captions.txt"))
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize("work", ["out", "out/work", "."])
def test_folders_that_would_meet_are_refused_before_anything_runs(
    model: Path, tmp_path: Path, work: str
) -> None:
    result = distill(model, tmp_path, "--work", str(tmp_path / work))
    assert result.exit_code == 1
    assert "name two that lie side by side" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_the_miniature_s_lora_has_at_most_two_megabytes(tmp_path: Path) -> None:
    config = WanTransformer3DModel.load_config(MINIATURE / "transformer")
    transformer = WanTransformer3DModel.from_config(config).bfloat16()
    Adapters(transformer, DistillSettings().rank, seed=0).save(tmp_path / LORA_FILE)
    assert (tmp_path / LORA_FILE).stat().st_size <= 2_000_000


def test_a_model_of_another_kind_is_refused(model: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    index = json.loads((model / "model_index.json").read_text())
    (foreign / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    result = distill(foreign, tmp_path)
    assert result.exit_code == 1
    assert "foreign is no folder of a WanPipeline" in result.output


def test_a_work_folder_of_other_settings_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "settings.json").write_text('{"steps": 3}')
    result = distill(model, tmp_path)
    assert result.exit_code == 1
    assert "is of a run with other settings (batch, captions" in " ".join(result.output.split())


def test_each_trajectory_has_its_own_noise_and_caption(model: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=2, batch=1, trajectories=2)
    Distillation(model, tmp_path / "work", settings, "cpu").run(Progress(1))
    files = sorted((tmp_path / "work").glob("round-*.safetensors"))
    recorded = [Trajectories.load(file, CPU) for file in files]
    assert len(recorded) == 4
    for one, other in itertools.combinations(recorded, 2):
        assert one.text.shape == (1, TEXT_TOKENS, TEXT_WIDTH)  # the length that is served
        assert not torch.equal(one.text, other.text)
        assert not torch.equal(one.states[:, 0], other.states[:, 0])
