"""Wan2.1-T2V-14B's transformer with random weights, made where it is measured: no file is read.

The figures of speed and memory do not depend on what the weights are; what does (how much is lost
in 8 bits) is measured on the miniature, which was trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

import quant
from quant.calibration.act_statistics import ActivationStatistics
from quant.calibration.calibrate import calibrate_transformer
from quant.calibration.prompts import MIN_PROMPTS

TEXT_TOKENS = 512
TEXT_WIDTH = 4096
FULL = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
TINY = {"num_layers": 40, "num_attention_heads": 1, "ffn_dim": 256}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one forward pass takes: a latent video, a timestep, an embedded prompt."""

    latents: Tensor
    timestep: Tensor
    prompt: Tensor

    @property
    def tokens(self) -> int:
        return self.latents.shape[2] * self.latents.shape[3] // 2 * self.latents.shape[4] // 2

    def twice(self) -> Inputs:
        """Both branches of guidance as one batch, the second with another prompt."""
        latents = torch.cat((self.latents, self.latents))
        prompt = torch.cat((self.prompt, -self.prompt))
        return Inputs(latents, self.timestep.repeat(2), prompt)

    def run(self, transformer: WanTransformer3DModel) -> Tensor:
        """[B, 16, F, H, W], what the transformer predicts."""
        with torch.no_grad():
            out: Tensor = transformer(self.latents, self.timestep, self.prompt, return_dict=False)[
                0
            ]
        return out


def random_transformer(
    device: torch.device, *, tiny: bool = False, seed: int = 0, tiny_heads: int = 1
) -> WanTransformer3DModel:
    """Make one in BF16, with the parts that diffusers keeps in float32 in float32."""
    shape = TINY | {"num_attention_heads": tiny_heads} if tiny else FULL
    with torch.device("meta"):
        model = WanTransformer3DModel(text_dim=TEXT_WIDTH, **shape)
    kept = set(model._keep_in_fp32_modules or ())
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        dtype = torch.float32 if kept & set(name.split(".")) else torch.bfloat16
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        if "norm" in name and name.endswith("weight"):
            weight.fill_(1)
        elif name.endswith("bias"):
            weight.zero_()
        else:
            weight.normal_(0, 0.02, generator=generator)
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, torch.nn.Parameter(weight, requires_grad=False))
    model.rope = WanRotaryPosEmbed(model.config.attention_head_dim, (1, 2, 2), 1024).to(device)
    return model.eval()


def random_inputs(device: torch.device, size: str, frames: int, seed: int = 0) -> Inputs:
    """Noise of a video's size, "WxH" in pixels, and a prompt that is noise as well."""
    width, height = (int(side) for side in size.split("x"))
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    return Inputs(
        randn(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8),
        torch.tensor([700.0], device=device),
        randn(1, TEXT_TOKENS, TEXT_WIDTH),
    )


def scales_from(
    transformer: WanTransformer3DModel, recipe: quant.QuantRecipe, inputs: Inputs
) -> quant.Scales:
    """Calibrate on a forward pass for each of as many noises as calibration wants prompts."""
    width, height = 8 * inputs.latents.shape[4], 8 * inputs.latents.shape[3]
    sampler = quant.SamplerSettings(
        size=(width, height),
        num_frames=4 * inputs.latents.shape[2] - 3,
        num_inference_steps=1,
        guidance_scale=1.0,
        text_tokens=TEXT_TOKENS,
        timestep_groups=1,
    )
    prompts = quant.PromptSet(tuple(f"noise {i}" for i in range(MIN_PROMPTS)), "noise")

    def run(_: int, statistics: ActivationStatistics) -> None:
        statistics.enter(0)
        inputs.run(transformer)
        inputs.latents.normal_()

    plan = quant.CalibrationPlan("random", recipe, prompts, sampler)
    return calibrate_transformer(transformer, plan, run)
