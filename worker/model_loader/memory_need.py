"""Add up the memory of a model's components and stages for one choice of placement."""

from __future__ import annotations

from dataclasses import dataclass

from quant.transformer.weight_storage import WeightStorage

GIB = 1 << 30
RESERVE_BYTES = 2 * GIB
ENCODING_BYTES = GIB // 2  # activations of the text encoder; a prompt has 512 tokens at most


@dataclass(frozen=True, slots=True)
class Need:
    """The peak memory of one choice of placement, in bytes.

    Attributes:
        resident: what stays on the device, by name; all of it counts.
        transient: what each stage adds, by stage; stages do not overlap, so the largest counts.
    """

    resident: dict[str, int]
    transient: dict[str, int]

    @property
    def total(self) -> int:
        """The peak: all that is resident, and the largest of the rest."""
        return sum(self.resident.values()) + max(self.transient.values())

    def __str__(self) -> str:
        resident = ", ".join(f"{name} {gib(size)}" for name, size in self.resident.items())
        transient = ", ".join(f"{name} {gib(size)}" for name, size in self.transient.items())
        return f"{gib(self.total)} GiB ({resident}, and the largest of: {transient})"


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """The bytes of a model's components and of its activations at the largest size and frames.

    Attributes:
        transformer: all modes together, with shared tensors counted once.
        transformer_loading: the peak while they are loaded; more if BF16 is read only to quantize.
        decoded_extra: what the transformers grow by if their weights are decoded once.
        decoded_at_once: weights that are decoded at a time if they are not.
    """

    transformer: int
    transformer_loading: int
    text_encoder: int
    vae: int
    denoising: int
    decoding: int
    decoding_tiled: int
    decoded_extra: int = 0
    decoded_at_once: int = 0

    def need(
        self, text_encoder: str, tiled: bool, weight_storage: WeightStorage = "packed"
    ) -> Need:
        """Add up the memory for one placement of the text encoder and one storage of weights."""
        decoding = self.decoding_tiled if tiled else self.decoding
        resident = self._transformer(weight_storage) | {"VAE": self.vae, "reserve": RESERVE_BYTES}
        transient = {
            "denoising": self.denoising,
            "decoding in tiles" if tiled else "decoding": decoding,
        }
        if text_encoder == "device":
            resident["text encoder"] = self.text_encoder
        elif text_encoder == "encode":
            transient["text encoder"] = self.text_encoder + ENCODING_BYTES
        return Need(resident, transient | self._quantizing)

    def follower_need(self, weight_storage: WeightStorage = "packed") -> Need:
        """Add up the memory of a follower, which only denoises.

        It counts all tokens, as each of two ranks has all of them with guidance.
        """
        resident = self._transformer(weight_storage) | {"reserve": RESERVE_BYTES}
        return Need(resident, {"denoising": self.denoising} | self._quantizing)

    def _transformer(self, weight_storage: WeightStorage) -> dict[str, int]:
        """Return what the transformers take as long as they are loaded."""
        if weight_storage == "bf16_grid":
            return {"transformer": self.transformer + self.decoded_extra}
        taken = {"transformer": self.transformer}
        return taken | ({"decoded weights": self.decoded_at_once} if self.decoded_at_once else {})

    @property
    def _quantizing(self) -> dict[str, int]:
        extra = self.transformer_loading - self.transformer
        return {"quantizing": extra} if extra else {}


def gib(size: int) -> str:
    """Return bytes as a number of GiB to print."""
    return f"{size / GIB:.1f}"
