"""What a Llama is: sizes, options and dtypes, checked on construction."""

from dataclasses import dataclass

from relax.ops.attention import IMPLEMENTATIONS
from relax.ops.feed_forward import ACTIVATIONS
from relax.ops.rope import KINDS, RopeScaling

DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("none", "full", "dots")
VOCAB_MULTIPLE = 64
# The projections of a layer, in the order in which they run: what LoRA can adapt.
LORA_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """One model of the Llama family; Qwen and Mistral are numbers and booleans of it.

    Names are those of the released `config.json` files where they mean the same.
    `vocab_size` None stands for the tokenizer's; `head_dim` None for hidden_size /
    num_attention_heads. `sliding_window` applies to the layers from
    `max_window_layers` on. `dropout` acts on the embeddings and on what each layer
    adds to the residual stream, in training alone. `lora_rank` 0 is a model without
    adapters; else each projection of `lora_targets` has one of that rank, whose output
    is scaled by lora_alpha / lora_rank and whose input is dropped by `lora_dropout`, in
    training alone (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1).
    """

    vocab_size: int | None
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None
    max_position_embeddings: int
    hidden_act: str
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    max_window_layers: int
    rope_theta: float
    rope_type: str
    rope_factor: float
    rope_original_max_position_embeddings: int | None
    rope_low_freq_factor: float
    rope_high_freq_factor: float
    rope_beta_fast: float
    rope_beta_slow: float
    rope_attention_factor: float | None
    rope_truncate: bool
    dropout: float
    initializer_range: float
    param_dtype: str
    compute_dtype: str
    scan_layers: bool
    remat: str
    attention: str
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_targets: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        self._check_positive()
        self._check_choices()
        self._check_heads()
        self._check_rope()
        self._check_lora()

    def _check_positive(self):
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "vocab_size",
            "head_dim",
            "sliding_window",
            "rope_theta",
            "rms_norm_eps",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"model.{name}={value} must be greater than 0")
        for name in ("dropout", "lora_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"model.{name}={getattr(self, name)} must lie in [0, 1)"
                )
        if not 0 <= self.max_window_layers <= self.num_hidden_layers:
            raise ValueError(
                f"model.max_window_layers={self.max_window_layers} must lie in "
                f"[0, model.num_hidden_layers={self.num_hidden_layers}]"
            )

    def _check_choices(self):
        for name, choices in (
            ("hidden_act", tuple(ACTIVATIONS)),
            ("rope_type", KINDS),
            ("param_dtype", DTYPES),
            ("compute_dtype", DTYPES),
            ("remat", REMAT),
            ("attention", ("auto", *IMPLEMENTATIONS)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"model.{name}={value!r} is unknown; choose one of "
                    f"{', '.join(choices)}"
                )

    def _check_heads(self):
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"model.num_attention_heads={heads} must be a multiple of "
                f"model.num_key_value_heads={kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} must be a multiple of "
                f"model.num_attention_heads={heads}, or model.head_dim be given"
            )
        if self.head_width % 2:
            raise ValueError(
                f"model.head_dim={self.head_width} must be even: RoPE rotates pairs"
            )

    def _check_rope(self):
        if self.rope_type != "default" and self.rope_factor < 1.0:
            raise ValueError(
                f"model.rope_factor={self.rope_factor} must be at least 1 with "
                f"model.rope_type={self.rope_type}"
            )
        if self.rope_type == "dynamic" and self.head_width <= 2:
            raise ValueError(
                f"model.rope_type=dynamic needs model.head_dim above 2, not "
                f"{self.head_width}"
            )
        if self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise ValueError(
                f"model.rope_low_freq_factor={self.rope_low_freq_factor} must be less "
                f"than model.rope_high_freq_factor={self.rope_high_freq_factor}"
            )

    def _check_lora(self):
        if self.lora_rank < 0:
            raise ValueError(
                f"model.lora_rank={self.lora_rank} must be at least 0 (0 is off)"
            )
        if not self.lora_alpha > 0:
            raise ValueError(f"model.lora_alpha={self.lora_alpha} must be above 0")
        targets = self.lora_targets
        if unknown := [name for name in targets if name not in LORA_TARGETS]:
            raise ValueError(
                f"model.lora_targets names {unknown[0]!r}, which is unknown; choose of "
                f"{', '.join(LORA_TARGETS)}"
            )
        if len(set(targets)) != len(targets) or (self.lora_rank and not targets):
            raise ValueError(
                f"model.lora_targets={list(targets)} must name at least one projection "
                "with model.lora_rank above 0, and none twice"
            )

    @property
    def head_width(self) -> int:
        """H: the width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary up to a multiple of 64."""
        if self.vocab_size is None:
            raise ValueError(
                "model.vocab_size is null: set it, or build the model with a tokenizer"
            )
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def rope_scaling(self) -> RopeScaling:
        """The frequencies' stretch, for `ops.rope`."""
        original = self.rope_original_max_position_embeddings
        return RopeScaling(
            kind=self.rope_type,
            factor=self.rope_factor,
            original_context=original or self.max_position_embeddings,
            low_freq_factor=self.rope_low_freq_factor,
            high_freq_factor=self.rope_high_freq_factor,
            beta_fast=self.rope_beta_fast,
            beta_slow=self.rope_beta_slow,
            attention_factor=self.rope_attention_factor,
            truncate=self.rope_truncate,
        )
