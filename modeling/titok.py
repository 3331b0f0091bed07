"""TiTok, an image as a short one-dimensional sequence of tokens (arXiv 2406.07550)."""

from collections.abc import Callable, Sequence

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from modeling.checkpoints.pretrained import Pretrained
from modeling.checkpoints.registry import TOKENIZER, register
from modeling.modules.conv import ConvDecoder
from modeling.modules.quantizer import VectorQuantizer, growing_choices
from modeling.modules.vit import VIT_SIZES, ViTDecoder, ViTEncoder, learned_vectors
from modeling.pixel_vqgan import ConvSizes, PixelVQGAN, conv_sizes
from utils.errors import UserError

OVERSHOOT = 0.2  # beyond [0, 1] that pixels may have


@register(TOKENIZER, "titok")
class TiTok(Pretrained):
    """Tokenizer of P x P images into N tokens, with a fixed number of tokens.

    Stage 1 (`model.vq_model.finetune_decoder: False`) decodes to logits over the codebook of the pixel VQGAN that
    teaches it. Stage 2 (`True`, also for inference) holds that VQGAN's codebook and decoder, and decodes to images;
    encoder, latent tokens and quantizer are then frozen (`model.vq_model.freeze_tokens: False` trains them on).

    Args:
        config: dict or DictConfig with the published nesting: `model.vq_model.*` (sizes), `model.pixel_vqgan.*`
            (sizes of the teacher, published ones by default), `dataset.preprocessing.crop_size` (P).
    """

    role = "tokenizer"

    demands_full_length = True
    unseen = {
        "model.vq_model.is_legacy": True,
        "model.vq_model.use_l2_norm": True,
        "model.vq_model.first_codes": None,
        **PixelVQGAN.unseen,  # of the pixel decoder
    }

    def __init__(self, config: dict | DictConfig):
        super().__init__()
        self.config = config = config if isinstance(config, DictConfig) else OmegaConf.create(config)
        vq_model = config.model.vq_model
        # The configurations in TiTok's repositories do not name the size.
        self.image_size = OmegaConf.select(config, "dataset.preprocessing.crop_size", default=256)
        self.num_latent_tokens = vq_model.num_latent_tokens
        self.codebook_size = vq_model.codebook_size
        self.finetune_decoder = vq_model.get("finetune_decoder", True)
        self.freeze_tokens = self.finetune_decoder and vq_model.get("freeze_tokens", True)
        self.first_codes = vq_model.get("first_codes") or self.codebook_size
        self.strict_length_assertion = vq_model.get("strict_length_assertion", self.demands_full_length)
        pixel_vqgan = conv_sizes(config)
        self._check_sizes(vq_model, pixel_vqgan)
        shared = {
            "image_size": self.image_size,
            "num_latent_tokens": self.num_latent_tokens,
            "token_size": vq_model.token_size,
        }
        encoder_size, decoder_size = VIT_SIZES[vq_model.vit_enc_model_size], VIT_SIZES[vq_model.vit_dec_model_size]
        self.encoder = ViTEncoder(
            size=encoder_size,
            patch_size=vq_model.vit_enc_patch_size,
            is_legacy=vq_model.get("is_legacy", True),
            **shared,
        )
        self.latent_tokens = learned_vectors(self.num_latent_tokens, encoder_size.width)
        self.decoder = ViTDecoder(
            size=decoder_size,
            patch_size=vq_model.vit_dec_patch_size,
            num_pixel_codes=pixel_vqgan.codebook_size,
            **shared,
        )
        self.quantize = VectorQuantizer(
            codebook_size=self.codebook_size,
            token_size=vq_model.token_size,
            commitment_cost=vq_model.get("commitment_cost", 0.25),
            use_l2_norm=vq_model.get("use_l2_norm", True),
            choices=self._choices(),
        )
        if self.freeze_tokens:
            for frozen in (self.encoder, self.quantize, self.latent_tokens):
                frozen.requires_grad_(False)
        if self.finetune_decoder:
            self.pixel_quantize = VectorQuantizer(
                codebook_size=pixel_vqgan.codebook_size,
                token_size=pixel_vqgan.conv["latent_channels"],
                use_l2_norm=False,
            )
            self.pixel_decoder = ConvDecoder(**pixel_vqgan.conv)

    def _check_sizes(self, vq_model: DictConfig, pixel_vqgan: ConvSizes) -> None:
        for name in ("vit_enc_model_size", "vit_dec_model_size"):
            if vq_model[name] not in VIT_SIZES:
                raise UserError(f"model.vq_model.{name} must be one of {', '.join(VIT_SIZES)}, got {vq_model[name]}")
        for name in ("vit_enc_patch_size", "vit_dec_patch_size"):
            if self.image_size % vq_model[name]:
                raise UserError(
                    f"dataset.preprocessing.crop_size must be a multiple of model.vq_model.{name} = {vq_model[name]}, "
                    f"got {self.image_size}"
                )
        factor = 2 ** (len(pixel_vqgan.conv["channel_multipliers"]) - 1)
        if self.finetune_decoder and factor != vq_model.vit_dec_patch_size:
            raise UserError(
                f"the pixel VQGAN enlarges by {factor} (model.pixel_vqgan.channel_multipliers), but "
                f"model.vq_model.vit_dec_patch_size is {vq_model.vit_dec_patch_size}: they must be equal"
            )

    def _choices(self) -> list[int] | None:
        """How many codes each token may choose among; None for all."""
        if self.first_codes == self.codebook_size:
            return None
        if not 2 <= self.first_codes < self.codebook_size:
            raise UserError(
                f"model.vq_model.first_codes must be in 2..{self.codebook_size}, the size of the codebook, or null for "
                f"all, got {self.first_codes}"
            )
        return growing_choices(self.first_codes, self.num_latent_tokens, self.codebook_size)

    def encode(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokenize images.

        Args:
            pixels: (B, 3, P, P) in [0, 1].

        Returns:
            z_quantized (B, C, 1, N), and a dict with `min_encoding_indices` (B, 1, N), the tokens, 0..V-1, and the
            scalars `quantizer_loss`, `commitment_loss`, `codebook_loss` (0 where the tokens are frozen).
        """
        self._check_pixels(pixels)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_tokens):
            z_quantized, result = self.quantize(self.encoder(pixels, self.latent_tokens))
        if self.freeze_tokens:
            result = {name: value * 0 if name.endswith("_loss") else value for name, value in result.items()}
        return z_quantized, result

    def _check_pixels(self, pixels: Tensor) -> None:
        """Refuse what would give tokens of nothing. Training, whose loaders give what they give, does not wait for the
        values."""
        if not isinstance(pixels, Tensor):
            raise UserError(f"encode takes a tensor, got {type(pixels).__name__}: convert it with torch.as_tensor")
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, self.image_size, self.image_size):
            raise UserError(
                f"this tokenizer takes images of shape (B, 3, {self.image_size}, {self.image_size}), "
                f"got {tuple(pixels.shape)}: resize and crop them first"
            )
        own = self.latent_tokens.dtype
        if not pixels.is_floating_point():
            raise UserError(f"pixels must be floating-point in [0, 1], got {pixels.dtype}: divide 0..255 by 255")
        if pixels.dtype != own and not torch.is_autocast_enabled(pixels.device.type):
            raise UserError(f"pixels are {pixels.dtype} and the weights {own}: convert one, as by pixels.float()")
        if self.training or torch.compiler.is_compiling() or not pixels.numel():
            return
        lowest, highest = map(float, pixels.aminmax())
        # Resampling may overshoot [0, 1] a little. NaN fails every comparison.
        if not (lowest >= -OVERSHOOT and highest <= 1 + OVERSHOOT):
            raise UserError(
                f"pixels must be in [0, 1], got {lowest:g} to {highest:g}: divide 0..255 by 255, turn -1..1 into "
                "(x + 1) / 2, and leave out images with NaN"
            )

    def decode(self, z_quantized: Tensor, length: int | Sequence[int] | Tensor | None = None) -> Tensor:
        """Images (stage 2, unclamped) or pixel-code logits (stage 1) from a prefix of the tokens.

        Args:
            z_quantized: (B, C, 1, K), K <= N; K = N where the model demands the full length.
            length: Use only the first `length` tokens, 1..K: one number, or one per image (B,). All by default.

        Returns:
            (B, 3, P, P) in stage 2, (B, codes, G, G) in stage 1.
        """
        return self._from_features(self._features(z_quantized, length))

    def decode_tokens(self, tokens: Tensor, length: int | Sequence[int] | Tensor | None = None) -> Tensor:
        """As `decode`, from tokens (B, K) or (B, 1, K) in 0..V-1."""
        tokens = _integers(tokens, "tokens").to(self.latent_tokens.device)
        if tokens.ndim not in (2, 3) or tokens.is_floating_point() or (tokens.ndim == 3 and tokens.shape[1] != 1):
            raise UserError(
                f"tokens must be integers of shape (B, K) or (B, 1, K), got {tuple(tokens.shape)} {tokens.dtype}"
            )
        tokens = tokens.flatten(1)[:, None].long()
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.codebook_size:
            raise UserError(
                f"tokens must be in 0..{self.codebook_size - 1}, got {int(tokens.min())}..{int(tokens.max())}: "
                "are they another tokenizer's?"
            )
        return self.decode(self.quantize.lookup(tokens).movedim(-1, 1), length)

    def forward(
        self,
        pixels: Tensor,
        length: int | Sequence[int] | Tensor | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode, then decode: (`decode`'s result, `encode`'s dict).

        Args:
            change: Given the tokens (B, N), those that are decoded in their place. The encoder's gradient is theirs.
        """
        z_quantized, result = self.encode(pixels)
        if change is not None:
            z_quantized = self._changed(z_quantized, change(result["min_encoding_indices"].flatten(1)))
        return self.decode(z_quantized, length), result

    def _changed(self, z_quantized: Tensor, tokens: Tensor) -> Tensor:
        """The codes of other tokens (B, N), with the gradient straight through to what (B, C, 1, N) came from."""
        codes = self.quantize.lookup(tokens[:, None]).movedim(-1, 1)
        return z_quantized + (codes - z_quantized).detach()

    def _features(
        self,
        z_quantized: Tensor,
        length: int | Sequence[int] | Tensor | None,
        early: list[Tensor] | None = None,
    ) -> Tensor:
        """The decoder's features of the grid, (B, W, G, G), from a prefix of the tokens; `early` as in `ViTDecoder`."""
        lengths = self._lengths(length, z_quantized.shape[0], z_quantized.shape[-1])
        longest = int(lengths.max()) if len(lengths) else z_quantized.shape[-1]
        uneven = bool((lengths != longest).any())
        z_quantized = z_quantized[..., :longest].to(self.latent_tokens.dtype)  # codes are float32, weights may be half
        return self.decoder(z_quantized, lengths if uneven else None, early)

    def _from_features(self, features: Tensor) -> Tensor:
        """What `decode` returns, from the decoder's features of the grid."""
        logits = self.decoder.ffn(features)
        if not self.finetune_decoder:
            return logits
        # The expected pixel embedding under the predicted distribution: differentiable, and better than the argmax.
        z_pixels = torch.einsum("bvhw,vc->bchw", logits.softmax(dim=1), self.pixel_quantize.embedding.weight)
        return self.pixel_decoder(z_pixels)

    def _lengths(self, length: int | Sequence[int] | Tensor | None, batch: int, available: int) -> Tensor:
        """Number of tokens to use of each image, (B,) int64 on the CPU, checked."""
        total = self.num_latent_tokens
        if not 1 <= available <= total:
            raise UserError(f"this tokenizer decodes 1..{total} tokens, got {available}")
        lengths = _integers(available if length is None else length, "length").cpu()
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise UserError(f"length must be an integer, got {length!r}")
        if lengths.ndim > 1 or (lengths.ndim == 1 and len(lengths) != batch):
            raise UserError(f"length must be one number or one per image ({batch}), got {tuple(lengths.shape)}")
        lengths = lengths.long().expand(batch)
        if batch and not 1 <= int(lengths.min()) <= int(lengths.max()) <= available:
            raise UserError(f"length must be in 1..{available}, got {length}: there are {available} tokens")
        if self.strict_length_assertion and bool((lengths != total).any()):
            raise UserError(
                f"this tokenizer needs all of its {total} tokens, got {length if length is not None else available} "
                "(model.vq_model.strict_length_assertion: False lifts this)"
            )
        return lengths


def _integers(values: Tensor | Sequence[int] | int, what: str) -> Tensor:
    """A tensor of whatever holds numbers."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{what} must be integers, got {values!r}: {error}") from error
