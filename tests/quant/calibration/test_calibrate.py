"""Calibration end to end on the real pipeline classes: statistics, scales, and errors."""

import dataclasses
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler

from quant.calibration import act_statistics
from quant.calibration.act_statistics import ActivationStatistics, ModuleInput
from quant.calibration.calibrate import CalibrationPlan, observed_names, run_calibration
from quant.calibration.prompts import PromptSet
from quant.calibration.sampler import default_sampler, resolve_sampler
from quant.calibration.sampling import load_pipeline, run_prompt
from quant.calibration.scales import Scales
from quant.errors import CalibrationError, ConversionError
from quant.numerics.granularity import PerChannel, PerToken
from quant.numerics.scaling import NUM_BINADES, POLICIES, binade_histogram
from quant.recipe.recipe import QuantRecipe

LINEARS, GROUPS, PROMPTS = 20, 2, 10
FFN_IN = "blocks.1.ffn.net.0.proj"


def with_recipe(plan: CalibrationPlan, **recipe_changes) -> CalibrationPlan:
    recipe = dataclasses.replace(plan.recipe, **recipe_changes)
    return dataclasses.replace(plan, recipe=recipe)


def test_statistics_have_the_documented_shapes(tiny_scales: Scales):
    assert len(tiny_scales.linears) == LINEARS
    assert tiny_scales.act_amax.shape == (LINEARS, GROUPS, PROMPTS)
    assert tiny_scales.act_mean_square.shape == (LINEARS, GROUPS, PROMPTS)
    assert tiny_scales.act_binades.shape == (LINEARS, GROUPS, NUM_BINADES)
    assert tiny_scales.num_prompts == PROMPTS
    assert (tiny_scales.act_amax > 0).all()
    assert (tiny_scales.act_amax.square() >= tiny_scales.act_mean_square).all()


def test_statistics_are_those_of_the_inputs(tiny_pipe, tiny_plan, tiny_scales: Scales):
    """Run the first prompt by hand, keep every input of one linear, and compare."""
    linear = tiny_pipe.transformer.get_submodule(FFN_IN)
    inputs: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].float()))
    tiny_pipe(
        prompt=tiny_plan.prompts.prompts[0],
        negative_prompt="",
        width=32,
        height=32,
        num_frames=5,
        num_inference_steps=4,
        guidance_scale=3.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    handle.remove()
    assert len(inputs) == 4 * 2  # steps, with and without the prompt
    row = tiny_scales.linears.index(FFN_IN)
    for group in range(GROUPS):
        observed = torch.cat(inputs[4 * group : 4 * group + 4])
        assert tiny_scales.act_amax[row, group, 0] == observed.abs().max()
        torch.testing.assert_close(
            tiny_scales.act_mean_square[row, group, 0], observed.square().mean()
        )


def test_default_scales_bring_what_was_seen_into_8_to_16(tiny_scales: Scales, tiny_pipe):
    for row, name in enumerate(tiny_scales.linears):
        act = tiny_scales.act_amax[row].max() / tiny_scales.act_scale[name]
        weight = tiny_pipe.transformer.get_submodule(name).weight.float().abs().max()
        assert tiny_scales.weight_amax[row] == weight
        assert 8 <= act < 16
        assert 8 <= weight / tiny_scales.weight_scale[name] < 16


def test_calibration_repeats_itself_bit_by_bit(tiny_pipe, tiny_plan, tiny_scales: Scales):
    again = run_calibration(tiny_pipe, tiny_plan)
    assert torch.equal(again.act_amax, tiny_scales.act_amax)
    assert torch.equal(again.act_binades, tiny_scales.act_binades)


def test_no_hook_is_left_behind(tiny_pipe, tiny_scales):
    assert not any(module._forward_pre_hooks for module in tiny_pipe.transformer.modules())


@pytest.mark.parametrize("policy", ["sqnr", "amax15", "none"])
def test_other_policies_choose_other_scales(tiny_pipe, tiny_plan, policy):
    chosen = POLICIES[policy]
    plan = with_recipe(tiny_plan, weight_policy=chosen, act_policy=chosen)
    scales = run_calibration(tiny_pipe, plan)
    weight = tiny_pipe.transformer.get_submodule(FFN_IN).weight.float()
    ratio = weight.abs().max() / scales.weight_scale[FFN_IN]
    expected = {"sqnr": (1, 64), "amax15": (14.99, 15.01), "none": (0.01, 1)}[policy]
    assert expected[0] <= ratio <= expected[1]
    assert scales.act_scale[FFN_IN].shape == ()


@pytest.mark.parametrize("policy", ["pow2", "sqnr"])
def test_per_channel_weights_get_a_scale_per_row(tiny_pipe, tiny_plan, policy):
    plan = with_recipe(tiny_plan, weight_granularity=PerChannel(), weight_policy=POLICIES[policy])
    scale = run_calibration(tiny_pipe, plan).weight_scale[FFN_IN]
    assert scale.shape == (64, 1)
    amax = tiny_pipe.transformer.get_submodule(FFN_IN).weight.float().abs().amax(1, keepdim=True)
    assert ((amax / scale >= 1) & (amax / scale < 64)).all()


def test_per_token_activations_need_no_scale(tiny_pipe, tiny_plan):
    scales = run_calibration(tiny_pipe, with_recipe(tiny_plan, act_granularity=PerToken()))
    assert scales.act_scale == {}
    assert scales.act_amax.shape == (LINEARS, GROUPS, PROMPTS)


def test_progress_is_reported_step_by_step(tiny_pipe, tiny_plan):
    progress: list[tuple[int, int]] = []
    run_calibration(tiny_pipe, tiny_plan, on_step=lambda *now: progress.append(now))
    total = PROMPTS * tiny_plan.sampler.num_inference_steps
    assert progress == [(done, total) for done in range(total + 1)]


def test_each_prompt_has_a_seed_of_its_own_counted_from_the_plans(tiny_pipe, tiny_plan):
    """Its first noise is that of seed, seed + 1, seed + 2, ... so that no two are alike."""
    sampler = dataclasses.replace(tiny_plan.sampler, seed=5)
    inputs: list[torch.Tensor] = []
    handle = tiny_pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    run_calibration(tiny_pipe, dataclasses.replace(tiny_plan, sampler=sampler))
    handle.remove()
    first_of_each = inputs[:: 2 * sampler.num_inference_steps]  # with and without the prompt
    assert len(first_of_each) == PROMPTS
    for index, noise in enumerate(first_of_each):
        expected = torch.randn(noise.shape, generator=torch.Generator().manual_seed(5 + index))
        assert torch.equal(noise, expected.to(noise.dtype)), f"prompt {index}"


def test_a_recipe_that_does_not_fit_stops_it(tiny_pipe, tiny_plan):
    plan = dataclasses.replace(tiny_plan, recipe=QuantRecipe.load("boundary-hif8"))
    with pytest.raises(ConversionError, match="this one has 4"):
        run_calibration(tiny_pipe, plan)


def test_a_prompt_the_pipeline_would_cut_stops_it(tiny_pipe, tiny_plan):
    long = PromptSet((*tiny_plan.prompts.prompts, "red " * 40), "long.txt")
    with pytest.raises(CalibrationError, match=r"has \d+ tokens, the limit is 16: shorten it"):
        run_calibration(tiny_pipe, dataclasses.replace(tiny_plan, prompts=long))


@pytest.mark.parametrize("wrong", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_before_anything_runs(tiny_model, tiny_plan, wrong):
    """It lies in a protected block, which no statistics are kept of."""
    pipe = load_pipeline(tiny_model, "cpu")
    with torch.no_grad():
        pipe.transformer.blocks[0].ffn.net[0].proj.bias[3] = wrong
    steps: list[int] = []
    message = r"^blocks\.0\.ffn\.net\.0\.proj\.bias of the transformer holds NaN or infinity"
    with pytest.raises(CalibrationError, match=message):
        run_calibration(pipe, tiny_plan, lambda done, _: steps.append(done))
    assert steps == []


def test_activations_that_are_not_finite_stop_it_in_the_same_step(tiny_pipe, tiny_plan):
    steps: list[int] = []

    def overflow(_module, _inputs, output):
        return output / 0 if steps and steps[-1] == 4 + 2 else output

    handle = tiny_pipe.transformer.blocks[1].ffn.net[0].register_forward_hook(overflow)
    message = r"^blocks\.1\.ffn\.net\.2 saw NaN or infinity in step 3 of prompt 'a red b'"
    with pytest.raises(CalibrationError, match=message):
        run_calibration(tiny_pipe, tiny_plan, lambda done, _: steps.append(done))
    handle.remove()
    assert steps[-1] == 4 + 2


def test_every_linear_has_the_statistics_of_its_own_input(tiny_pipe, tiny_plan):
    """To the last bit those of measuring each linear apart, as calibration did before it shared."""
    plan = dataclasses.replace(tiny_plan, prompts=tiny_plan.prompts.first(8))
    names = observed_names(tiny_pipe.transformer, plan.recipe)
    shape = (LINEARS, GROUPS, 8)
    amax, squares, count = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    binades = torch.zeros(LINEARS, GROUPS, NUM_BINADES)
    seen = [0] * LINEARS

    def measure(row: int, x: torch.Tensor) -> None:
        prompt, call = divmod(seen[row], 2 * plan.sampler.num_inference_steps)
        seen[row] += 1
        cell = row, plan.sampler.group_of_step(call // 2), prompt
        amax[cell] = torch.maximum(amax[cell], x.abs().max())
        squares[cell] += x.float().square().sum(dtype=torch.float64)
        count[cell] += x.numel()
        binades[cell[:2]] += binade_histogram(x.reshape(1, -1))[0]

    handles = [
        tiny_pipe.transformer.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, row=row: measure(row, inputs[0])
        )
        for row, name in enumerate(names)
    ]
    scales = run_calibration(tiny_pipe, plan)
    for handle in handles:
        handle.remove()
    assert torch.equal(scales.act_amax, amax.float())
    assert torch.equal(scales.act_mean_square, (squares / count).float())
    assert torch.equal(scales.act_binades, binades)


def test_each_input_is_measured_once(tiny_pipe, tiny_plan, monkeypatch):
    """Queries, keys and values of a block have one input, and all blocks the same text."""
    measured: list[torch.Size] = []

    def counted(x: torch.Tensor, sum_to: torch.dtype):
        measured.append(x.shape)
        return measure(x, sum_to)

    measure = act_statistics._measure
    monkeypatch.setattr(act_statistics, "_measure", counted)
    run_calibration(tiny_pipe, dataclasses.replace(tiny_plan, prompts=tiny_plan.prompts.first(8)))
    passes = 8 * tiny_plan.sampler.num_inference_steps * 2
    assert len(measured) == passes * (2 * 6 + 1)  # blocks, their different inputs, and the text


def test_a_tensor_that_was_changed_in_place_is_measured_again():
    linears = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    statistics = ActivationStatistics([ModuleInput(x) for x in linears], 1, 1, torch.device("cpu"))
    x = torch.ones(2, 4)
    with statistics.observing(), torch.no_grad():
        linears[0](x)
        linears[1](x.mul_(3))
    assert statistics.amax.flatten().tolist() == [1, 3]


def test_the_flow_shift_is_set_for_the_run_only(tiny_pipe, tiny_plan):
    given: list[float] = []
    handle = tiny_pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    own = tiny_pipe.scheduler
    sampler = dataclasses.replace(tiny_plan.sampler, flow_shift=12.0)
    run_prompt(tiny_pipe, tiny_plan.prompts, sampler, 0, lambda step: None)
    handle.remove()
    shifted = UniPCMultistepScheduler.from_config(own.config, flow_shift=12.0)
    shifted.set_timesteps(4)
    assert given[::2] == shifted.timesteps.tolist()
    assert tiny_pipe.scheduler is own
    own.set_timesteps(4)
    assert given[::2] != own.timesteps.tolist()


def test_a_scheduler_without_a_shift_is_named(tiny_model, tiny_plan):
    pipe = load_pipeline(tiny_model, "cpu")
    pipe.scheduler = DDIMScheduler()
    plan = dataclasses.replace(
        tiny_plan, sampler=dataclasses.replace(tiny_plan.sampler, flow_shift=3.0)
    )
    with pytest.raises(CalibrationError, match=r"shift 3 cannot be set: .* DDIMScheduler, has"):
        run_calibration(pipe, plan)


def test_histogram_adds_up_over_prompts():
    linear = torch.nn.Linear(4, 4)
    statistics = ActivationStatistics([ModuleInput(linear)], 1, 2, torch.device("cpu"))
    batches = torch.randn(2, 3, 4)
    with statistics.observing():
        for prompt, x in enumerate(batches):
            statistics.begin(prompt)
            linear(x)
    assert torch.equal(statistics.binades[0, 0], binade_histogram(batches.reshape(1, -1))[0])
    torch.testing.assert_close(statistics.mean_square[0, 0], batches.square().mean((1, 2)))


@pytest.mark.parametrize("folder", ["absent", ""])
def test_a_folder_without_a_pipeline_is_refused(tmp_path, folder):
    with pytest.raises(CalibrationError, match=r"holds no model_index\.json: give the folder"):
        load_pipeline(tmp_path / folder, "cpu")


def test_a_broken_pipeline_is_refused(tmp_path, tiny_model):
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    shutil.rmtree(broken / "text_encoder")
    with pytest.raises(CalibrationError, match="broken does not load as a WanPipeline"):
        load_pipeline(broken, "cpu")


@pytest.mark.parametrize(
    ("heads", "head_dim", "size"), [(4, 32, "96x96"), (12, 128, "832x480"), (40, 128, "832x480")]
)
def test_known_models_have_default_samplers(heads, head_dim, size):
    config = {"num_attention_heads": heads, "attention_head_dim": head_dim}
    assert default_sampler(config).size_text == size
    assert resolve_sampler(config, {"seed": 5, "num_frames": None}).seed == 5


def test_unknown_models_need_their_geometry():
    config = {"num_attention_heads": 2, "attention_head_dim": 16}
    with pytest.raises(CalibrationError, match=r"32 wide \(known: 128, 1536, 5120\): give --size"):
        resolve_sampler(config, {"num_frames": 5})
    geometry = {"size": (32, 32), "num_frames": 5, "num_inference_steps": 4, "text_tokens": 16}
    assert resolve_sampler(config, geometry | {"seed": None}).guidance_scale == 5.0


def test_prompt_files_are_checked(tmp_path):
    path = tmp_path / "prompts.txt"
    with pytest.raises(CalibrationError, match=r"cannot read prompts from .*: No such file"):
        PromptSet.read(path)
    path.write_text("")
    with pytest.raises(CalibrationError, match="holds 0 prompts, at least 8 are needed"):
        PromptSet.read(path)
    path.write_text("\n".join(f"prompt {i}" for i in range(7)))
    with pytest.raises(CalibrationError, match="holds 7 prompts"):
        PromptSet.read(path)
    path.write_text("\n".join(["a red ball"] + [f"prompt {i}" for i in range(8)] + ["a red ball "]))
    with pytest.raises(CalibrationError, match="prompt 10 repeats prompt 1, 'a red ball'; remove"):
        PromptSet.read(path)
    path.write_bytes(b"\xff\xfe" * 9)
    with pytest.raises(CalibrationError, match="is not UTF-8 text"):
        PromptSet.read(path)


def test_the_prompt_hash_is_of_the_prompts_alone(tmp_path):
    lines = [f"prompt {i}" for i in range(8)]
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(lines) + "\r\n")
    read = PromptSet.read(path)
    assert read.prompts == tuple(lines)
    assert read.file == "prompts.txt"
    assert read.sha256 == PromptSet(tuple(lines), "elsewhere.txt").sha256
    assert read.sha256 != PromptSet(tuple(reversed(lines)), "prompts.txt").sha256
