"""MaskGIT generators: class in, latent tokens out, many tokens a step (arXiv 2202.04200; 2406.07550, section 4)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from modeling.checkpoints.pretrained import Pretrained
from modeling.checkpoints.registry import GENERATOR, class_named, register
from modeling.modules.blocks import Linear, attention
from modeling.modules.masking import ImageNoise, random_drop, rows_at, seeds_of
from modeling.samplers import sampler_class
from modeling.samplers.sampler import Sampler, State
from modeling.samplers.settings import SamplerSettings
from utils.errors import UserError


class MaskGIT(Pretrained):
    """What both generators share: the vocabulary, the checks and the sampler. Their networks give `logits`.

    One vocabulary of V + classes + 2 entries: image tokens 0..V-1, the mask V, class c at V + 1 + c, and last the
    class that stands for "dropped". The network reads [class, N image tokens].

    Args:
        config: dict or DictConfig with the published nesting: `model.vq_model.codebook_size` (V), and in
            `model.generator` the sizes `hidden_size`, `num_hidden_layers`, `num_attention_heads`,
            `intermediate_size`, the rates `dropout`, `attn_drop`, then `image_seq_len` (N, by default the tokenizer's
            `num_latent_tokens`) and `condition_num_classes`. What is left out has the published value.
    """

    role = "generator"
    pipeline_tag = "unconditional-image-generation"  # the hub has no class-conditional one
    tags = ("class-conditional-image-generation", "arxiv:2202.04200", "arxiv:2406.07550", "arxiv:2501.10064")
    unseen = {"model.generator.num_attention_heads": 16}

    def __init__(self, config: dict | DictConfig):
        super().__init__()
        self.config = config = config if isinstance(config, DictConfig) else OmegaConf.create(config)
        vq_model, generator = config.model.vq_model, config.model.generator
        self.codebook_size = vq_model.codebook_size
        self.num_tokens = generator.get("image_seq_len", vq_model.get("num_latent_tokens"))
        self.num_classes = generator.get("condition_num_classes", 1000)
        self.mask_token = self.codebook_size
        self.dropped_class = self.codebook_size + 1 + self.num_classes
        self.vocabulary_size = self.dropped_class + 1
        if self.num_tokens is None:
            raise UserError("model.generator.image_seq_len, the number of image tokens, is missing from the config")
        self.width = generator.get("hidden_size", 768)
        self.num_layers = generator.get("num_hidden_layers", 24)
        self.block_sizes = {
            "width": self.width,
            "num_heads": generator.get("num_attention_heads", 16),
            "hidden": generator.get("intermediate_size", 3072),
            "dropout": generator.get("dropout", 0.1),
            "attention_dropout": generator.get("attn_drop", 0.1),
        }
        if self.width % self.block_sizes["num_heads"]:
            raise UserError(
                f"model.generator.hidden_size must be a multiple of num_attention_heads = "
                f"{self.block_sizes['num_heads']}, got {self.width}"
            )

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The network: [class, image tokens] (B, 1 + N) to logits over the codebook at the image tokens (B, N, V).

        With `positions` (B, M), 0..N-1, at those image tokens alone, (B, M, V).
        """
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        condition: Tensor,
        cond_drop_prob: float | Tensor = 0.1,
        positions: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """Predict every image token from the known ones and the class.

        Values are checked here on the CPU only, because looking at them would make the host wait for an accelerator.
        On CUDA a wrong label or code fails in the embedding's own bounds check: it is never taken for another entry of
        the vocabulary. `generate` checks its labels on every device.

        Args:
            input_ids: Image tokens, (B, N) or (B, 1, N), in 0..V-1, or V where masked.
            condition: Class labels, (B,), in 0..classes-1. Not changed.
            num_tokens: There are only the first so many tokens, N above; the network does without the others.
            cond_drop_prob: Probability that an image loses its class, in training and evaluation mode alike; or
                which images do, (B,) bool.
            positions: Where predictions are wanted, (B, M) in 0..N-1; everywhere by default.

        Returns:
            Logits, (B, N, V), or (B, M, V) with `positions`.
        """
        condition = _labels(condition)
        num_tokens = self.num_tokens if num_tokens is None else num_tokens
        if input_ids.ndim not in (2, 3) or tuple(input_ids.shape) not in (
            (len(condition), num_tokens),
            (len(condition), 1, num_tokens),
        ):
            raise UserError(
                f"image tokens must have the shape (B, {num_tokens}) or (B, 1, {num_tokens}) with one label "
                f"an image, got {tuple(input_ids.shape)} and {len(condition)} labels"
            )
        _require_integers(input_ids, "image tokens")
        if input_ids.device.type == "cpu":
            _require_range(input_ids, self.mask_token, f"image tokens ({self.mask_token} is the mask)")
        if condition.device.type == "cpu":
            _require_range(condition, self.num_classes - 1, "class labels")
        if not isinstance(cond_drop_prob, Tensor):
            cond_drop_prob = random_drop(len(condition), cond_drop_prob, condition.device)
        input_ids = _unknown_outside(input_ids.flatten(1), self.mask_token)
        classes = _unknown_outside(condition, self.num_classes - 1, offset=self.codebook_size + 1)
        classes = classes.masked_fill(cond_drop_prob.to(classes.device), self.dropped_class)
        return self.logits(torch.cat([classes[:, None], input_ids], dim=1), positions)

    @torch.no_grad()
    def generate(
        self,
        condition: Tensor | Sequence[int] | None,
        guidance_scale: float = 3.0,
        guidance_decay: str = "constant",
        guidance_scale_pow: float = 3.0,
        randomize_temperature: float = 4.5,
        softmax_temperature_annealing: bool = False,
        num_sample_steps: int = 8,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        return_intermediate: bool = False,
        sampler: str = "confidence",
        *,
        prefix: Tensor | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Sample image tokens for the given classes: all masked at first, or all but a prefix; all known at last.

        Each image draws its noise from its own seed, so that it comes out the same alone and in a batch (up to ties
        within rounding), on the same kind of device. Runs in evaluation mode, and leaves the mode as it was.

        Args:
            condition: Class labels, (B,), in 0..classes-1; none give (0, N). None, with a prefix: unknown.
            guidance_scale, guidance_decay, guidance_scale_pow: Classifier-free guidance, see `guidance_weight`. Steps
                where its weight is 0 leave the unconditional half of the batch out.
            randomize_temperature: Scale of the Gumbel noise at the start, falling linearly to 0; 0 samples greedily.
            softmax_temperature_annealing: Divide the logits by 1.3 at the start, falling linearly to 0.5.
            num_sample_steps: Number of forward passes, 1 or more.
            generator: Gives the images' seeds, in their order; by default torch's own generator on the CPU.
            seeds: The images' seeds themselves, one each, 0..2**64 - 1, instead of `generator`.
            return_intermediate: Also give the tokens after each step.
            sampler: How tokens are chosen, a name in `modeling.samplers.SAMPLERS`.
            prefix: First tokens that are known, (B, K) in 0..V-1, K under N. They stay, and the others are sampled in
                at most as many passes as there are.
            options: Further `SamplerSettings`. With `num_tokens` N is that: a draft of the first tokens alone, as if an
                image had no others, in at most as many passes, each over as many tokens.

        Returns:
            (B, N) int64 in 0..V-1; with `return_intermediate` also (steps, B, N), where V is still masked.
        """
        how = guidance_scale, guidance_decay, guidance_scale_pow, randomize_temperature, softmax_temperature_annealing
        settings = SamplerSettings(*how, num_sample_steps, sampler, **options)
        num_tokens = self._num_sampled(settings)
        labels = None if condition is None and prefix is not None else self._checked_labels(condition)
        known = self._checked_prefix(prefix, len(prefix if labels is None else labels), num_tokens)
        settings = self._within_passes(settings, num_tokens - known.shape[1])
        method = sampler_class(settings.sampler)(settings, num_tokens, self.codebook_size, known.shape[1])
        after = self._sampled(labels, method, known, seeds_of(len(known), generator, seeds))
        return (after[-1], after) if return_intermediate else after[-1]

    def _num_sampled(self, settings: SamplerSettings) -> int:
        """Tokens of a whole image or of a draft."""
        num_tokens = settings.num_tokens or self.num_tokens
        if num_tokens > self.num_tokens:
            raise UserError(f"num_tokens must be at most {self.num_tokens}, got {num_tokens}")
        return num_tokens

    def _within_passes(self, settings: SamplerSettings, num_open: int) -> SamplerSettings:
        """A pass a token at most in a draft or after a prefix; the published sampler may take more."""
        if num_open >= self.num_tokens and not settings.num_tokens:
            return settings
        return replace(settings, num_sample_steps=min(settings.num_sample_steps, num_open))

    def _sampled(self, labels: Tensor | None, sampler: Sampler, known: Tensor, seeds: Sequence[int]) -> Tensor:
        """The tokens after each step, (steps, B, N), in evaluation mode."""
        device = next(self.parameters()).device
        labels = labels if labels is None else labels.to(device)
        state = sampler.start(known.to(device), ImageNoise(seeds, device))
        was_training = self.training
        self.eval()
        try:
            return torch.stack(list(self._sampling_steps(labels, sampler, state)))
        finally:
            self.train(was_training)

    def _sampling_steps(self, labels: Tensor | None, sampler: Sampler, state: State) -> Iterator[Tensor]:
        """The tokens after each step, (B, N), with the mask token where still masked."""
        for step in range(sampler.settings.num_sample_steps):
            weight = sampler.settings.guidance_weight(step)
            state = sampler.step(self._guided_logits(state, labels, weight), state)
            yield state.tokens

    def _guided_logits(self, state: State, labels: Tensor | None, weight: float) -> Tensor:
        """Logits in float32, (B, M, V), with the conditional and unconditional halves in one forward pass."""
        tokens, positions = state.tokens, state.positions
        logits = partial(self, num_tokens=tokens.shape[1])
        kept = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        if labels is None:
            return logits(tokens, kept.long(), ~kept, positions).float()
        if weight == 0:
            return logits(tokens, labels, kept, positions).float()
        classes = torch.cat([kept, ~kept])
        both = logits(tokens.repeat(2, 1), labels.repeat(2), classes, positions.repeat(2, 1)).float()
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, 1 + weight)  # conditional + weight (conditional - unconditional)

    def _checked_labels(self, condition: Tensor | Sequence[int] | None) -> Tensor:
        labels = _given_labels(condition)
        _require_range(labels, self.num_classes - 1, "class labels")
        return labels

    def _checked_prefix(self, prefix: Tensor | None, num_images: int, num_tokens: int) -> Tensor:
        """The tokens that are given, (B, K) int64, on the CPU or wherever they are."""
        if prefix is None:
            return torch.empty(num_images, 0, dtype=torch.long)
        _require_integers(prefix, "tokens of a prefix")
        if prefix.ndim != 2 or len(prefix) != num_images or prefix.shape[1] >= num_tokens:
            raise UserError(
                f"a prefix must have the shape ({num_images}, K), K under {num_tokens}, got {tuple(prefix.shape)}"
            )
        _require_range(prefix, self.codebook_size - 1, "tokens of a prefix")
        return prefix.long()


@register(GENERATOR, "ViT")
class ImageBert(MaskGIT):
    """MaskGIT on a BERT encoder. Parameter names are those of BERT as published by Hugging Face."""

    def __init__(self, config: dict | DictConfig):
        super().__init__(config)
        sizes = self.block_sizes
        layers = [BertLayer(**sizes) for _ in range(self.num_layers)]
        self.model = nn.ModuleDict(
            {
                "embeddings": BertEmbeddings(self.vocabulary_size, self.num_tokens + 1, self.width, sizes["dropout"]),
                "encoder": nn.ModuleDict({"layer": nn.ModuleList(layers)}),
                "lm_head": Linear(self.width, self.codebook_size),
            }
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        x = self.model["embeddings"](tokens)  # (B, 1 + N, W)
        for layer in self.model["encoder"]["layer"]:
            x = layer(x)
        x = x[:, 1:]
        return self.model["lm_head"](x if positions is None else rows_at(x, positions))


class BertEmbeddings(nn.Module):
    """Token, learned position and token type (always the first), summed and normalised."""

    def __init__(self, vocabulary_size: int, num_positions: int, width: int, dropout: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary_size, width)
        self.position_embeddings = nn.Embedding(num_positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: tokens.shape[1]]
        x = self.word_embeddings(tokens) + positions + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))


class BertLayer(nn.Module):
    """Post-norm transformer block (BERT, arXiv 1810.04805)."""

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float, attention_dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        projections = {name: Linear(width, width) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(
            {"self": nn.ModuleDict(projections), "output": BertResidual(width, width, dropout)}
        )
        self.intermediate = nn.ModuleDict({"dense": Linear(width, hidden)})
        self.output = BertResidual(hidden, width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            rearrange(projection(x), "b t (heads d) -> b heads t d", heads=self.num_heads)
            for projection in self.attention["self"].values()
        )
        mixed = attention(queries, keys, values, dropout=self.attention_dropout if self.training else 0.0)
        x = self.attention["output"](rearrange(mixed, "b heads t d -> b t (heads d)"), x)
        return self.output(self.intermediate["dense"](x, gelu=True), x)


class BertResidual(nn.Module):
    """The end of a BERT sub-layer: linear, dropout, add the sub-layer's input, normalise."""

    def __init__(self, hidden: int, width: int, dropout: float):
        super().__init__()
        self.dense = Linear(hidden, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


@register(GENERATOR, "UViT")
class UViTBert(MaskGIT):
    """MaskGIT on a U-ViT: the first half of the blocks feeds the second through long skips (arXiv 2209.12152).

    As in the published code nothing is dropped out in training, whatever `dropout` and `attn_drop` say.
    """

    def __init__(self, config: dict | DictConfig):
        super().__init__(config)
        if self.num_layers % 2:
            raise UserError(
                "model.generator.num_hidden_layers must be even for a UViT, which has as many blocks before its middle "
                f"block as after it, got {self.num_layers}"
            )
        half = self.num_layers // 2
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_tokens + 1, self.width))
        self.embeddings = nn.Embedding(self.vocabulary_size, self.width)
        sizes = {name: self.block_sizes[name] for name in ("width", "num_heads", "hidden")}
        self.in_blocks = nn.ModuleList(UViTBlock(**sizes) for _ in range(half))
        self.mid_block = UViTBlock(**sizes)
        self.out_blocks = nn.ModuleList(UViTBlock(**sizes, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(self.width)
        self.lm_head = Linear(self.width, self.codebook_size)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        x = self.embeddings(tokens) + self.pos_embed[:, : tokens.shape[1]]  # (B, 1 + N, W)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(block.skip_linear(torch.cat([x, skips.pop()], dim=-1)))
        x = x[:, 1:]
        return self.lm_head(self.norm(x if positions is None else rows_at(x, positions)))


class UViTBlock(nn.Module):
    """Pre-norm transformer block; one with `skip` also owns the linear layer that merges the skip before it."""

    def __init__(self, width: int, num_heads: int, hidden: int, skip: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = UViTAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": Linear(width, hidden), "fc2": Linear(hidden, width)})
        if skip:
            self.skip_linear = Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](self.mlp["fc1"](self.norm2(x), gelu=True))


class UViTAttention(nn.Module):
    """Multi-head self-attention with one packed projection without bias."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = rearrange(
            self.qkv(x), "b t (qkv heads d) -> qkv b heads t d", qkv=3, heads=self.num_heads
        )
        return self.proj(rearrange(attention(queries, keys, values), "b heads t d -> b t (heads d)"))


def generator_class(config: DictConfig) -> type[MaskGIT]:
    """The network that `model.generator.model_type` names (`ViT`, the default, or `UViT`)."""
    return class_named(GENERATOR, config.model.generator.get("model_type", "ViT"), MaskGIT)


def _given_labels(condition: Tensor | Sequence[int]) -> Tensor:
    """Class labels as (B,) int64, from whatever holds integers."""
    try:
        labels = torch.as_tensor(condition)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"class labels must be integers, one an image, got {condition!r}: {error}") from error
    return _labels(labels if isinstance(condition, Tensor) or labels.numel() else labels.long())


def _labels(condition: Tensor) -> Tensor:
    """Class labels as (B,) int64, from (B,) or (B, 1)."""
    _require_integers(condition, "class labels")
    if condition.ndim not in (1, 2) or condition.numel() != len(condition):
        raise UserError(f"class labels must have the shape (B,), one an image, got {tuple(condition.shape)}")
    return condition.reshape(-1).long()


def _require_integers(values: Tensor, what: str) -> None:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise UserError(f"{what} must be integers, got {values.dtype}")


def _require_range(values: Tensor, highest: int, what: str) -> None:
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) <= highest:
        raise UserError(f"{what} must be in 0..{highest}, got {int(values.min())}..{int(values.max())}")


def _unknown_outside(values: Tensor, highest: int, offset: int = 0) -> Tensor:
    """`values` + `offset`, with -1, which no embedding has, for what is outside 0..highest."""
    return torch.where((values >= 0) & (values <= highest), values + offset, -1)
