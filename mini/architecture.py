"""Define the architecture of the miniature model, with the classes of Wan2.1-T2V-14B.

It is small enough to train in minutes and to run on a CPU. Numbers that matter to the service are
those of the large model: 40 transformer blocks of 10 linears, VAE strides of 4 in time and 8 in
space, 16 latent channels. Numbers that only affect the cost are smaller: width, heads, text
encoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WIDTH_PX = HEIGHT_PX = 96
NUM_FRAMES = 17
FPS = 8
LATENT_CHANNELS = 16
LATENT_SHAPE = (LATENT_CHANNELS, 1 + (NUM_FRAMES - 1) // 4, HEIGHT_PX // 8, WIDTH_PX // 8)
VOCABULARY_SIZE = 512
# Captions of the world have at most 40 tokens; the worker pads to this length. The model was also
# trained at the pipeline's default of 512, so a plain `WanPipeline` call works as well.
TEXT_TOKENS = 64
FLOW_SHIFT = 3.0
TEXT_WIDTH = 96


@dataclass(frozen=True, slots=True)
class Miniature:
    """The tokenizer and the three models of one pipeline."""

    tokenizer: PreTrainedTokenizerFast
    text_encoder: UMT5EncoderModel
    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan

    def pipeline(self) -> WanPipeline:
        """Build the pipeline that diffusers loads from `models/wan-mini`."""
        return WanPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            transformer=self.transformer,
            vae=self.vae,
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
            ),
        )


def build_vae() -> AutoencoderKLWan:
    """Build a Wan VAE of 2.6 M parameters; training replaces its latent statistics of 0 and 1."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_transformer() -> WanTransformer3DModel:
    """Build a transformer of 40 Wan blocks with width 128: 10.8 M parameters."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=512,
        num_layers=40,
    )


def build_text_encoder() -> UMT5EncoderModel:
    """Build a three-layer UMT5 encoder for the miniature's vocabulary."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=VOCABULARY_SIZE,
            d_model=TEXT_WIDTH,
            d_kv=24,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with T5's `</s>` ending on `captions`; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
