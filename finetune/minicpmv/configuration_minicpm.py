"""Configuration of both models, read from and written in the hub's `config.json` format."""

from __future__ import annotations

import copy

from transformers import GraniteConfig, Idefics2VisionConfig, LlamaConfig, PreTrainedConfig

LLM_TYPES = {
    "llama3": "MiniCPM-Llama3-V 2.5 (openbmb/MiniCPM-Llama3-V-2_5)",
    "minicpm": "MiniCPM-V 2.0 (openbmb/MiniCPM-V-2)",
}
KERNELS = ("attn_implementation", "attn_implementation_internal", "experts_implementation")  # what may name some


class StripVisionConfig(Idefics2VisionConfig):
    """2.5's `vision_config`, under the name that the hub's file has for it. An object, not a dict, since other programs
    that load this class (vLLM) read its attributes."""

    model_type = "idefics2"


class MiniCPMVConfig(PreTrainedConfig):
    """Flat configuration with the hub's field names; `llm_type` tells the two supported models apart.

    Fields that only MiniCPM-Llama3-V 2.5 has: `vision_config` (SigLIP in the NaViT layout of Idefics2),
    `batch_vision_input`, `slice_config`. Only MiniCPM-V 2.0: `vision_encoder` (a timm model name), `scale_emb`,
    `scale_depth`, `dim_model_base`, `max_slice_nums`, `scale_resolution`. Sizes of pictures are in pixels.

    Raises:
        ValueError: when the fields are those of neither model (a later MiniCPM-V, for example).
    """

    model_type = "minicpmv"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # its name before transformers 5.24, and since

    def __init__(
        self,
        vocab_size: int = 128256,
        hidden_size: int = 4096,
        intermediate_size: int = 14336,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 8192,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_scaling: dict | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        query_num: int = 64,
        image_size: int = 448,
        patch_size: int = 14,
        drop_vision_last_layer: bool = True,
        vision_config: dict | None = None,
        vision_encoder: str | None = None,
        slice_config: dict | None = None,
        max_slice_nums: int | None = None,
        scale_resolution: int | None = None,
        scale_emb: float | None = None,
        scale_depth: float | None = None,
        dim_model_base: int | None = None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        if rope_scaling:  # null in both checkpoints; transformers 5 calls it rope_parameters
            self.rope_parameters = {"rope_theta": rope_theta, **rope_scaling}
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.query_num = query_num
        self.image_size = image_size
        self.patch_size = patch_size
        self.drop_vision_last_layer = drop_vision_last_layer
        if isinstance(vision_config, dict) and vision_config.get("model_type") == StripVisionConfig.model_type:
            vision_config = StripVisionConfig(**{k: v for k, v in vision_config.items() if k != "model_type"})
        self.vision_config = vision_config
        if vision_encoder is not None and ":" in vision_encoder:  # timm would fetch what hf-hub:owner/name describes
            raise ValueError(f"vision_encoder {vision_encoder!r}: expected the name of one of timm's own models")
        self.vision_encoder = vision_encoder
        self.slice_config = slice_config
        self.max_slice_nums = max_slice_nums
        self.scale_resolution = scale_resolution
        self.scale_emb = scale_emb
        self.scale_depth = scale_depth
        self.dim_model_base = dim_model_base
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers, which would fetch the attention kernels from the hub that a file may name; which ones are
        used is for the caller to say."""
        return super().from_dict(_without_kernels(config_dict), **kwargs)

    @property
    def llm_type(self) -> str:
        """`llama3` for MiniCPM-Llama3-V 2.5, `minicpm` for MiniCPM-V 2.0."""
        if self.vision_config is not None and self.scale_emb is None:
            if isinstance(self.vision_config, StripVisionConfig):
                return "llama3"
        elif self.vision_encoder is not None and self.scale_emb is not None:
            return "minicpm"
        raise ValueError(
            f"config.json of {self.name_or_path or 'this model'} (version {getattr(self, 'version', None)!r}, "
            f"vision_config {'present' if self.vision_config else 'missing'}, scale_emb {self.scale_emb}) describes "
            f"none of the supported models: {'; '.join(LLM_TYPES.values())}."
        )

    @property
    def slicing(self) -> dict[str, int]:
        """How pictures are cut: `max_slice_nums`, `scale_resolution` (pixels), `patch_size` (pixels)."""
        nested = self.slice_config or {}
        return {
            "max_slice_nums": nested.get("max_slice_nums") or self.max_slice_nums or 9,
            "scale_resolution": nested.get("scale_resolution") or self.scale_resolution or 448,
            "patch_size": nested.get("patch_size") or self.patch_size,
        }

    def set_max_slice_nums(self, most: int) -> None:
        """Most slices of a picture beside its overview, where each model's configuration keeps it."""
        if self.slice_config is not None:
            self.slice_config = {**self.slice_config, "max_slice_nums": most}
        else:
            self.max_slice_nums = most

    def to_diff_dict(self) -> dict:
        """What is written to `config.json`: the hub's fields, so that other programs find what they look for. Fields of
        the other model, which are None here, are left out; the dtype stands under the name before transformers 5 too.
        """
        fields = {name: value for name, value in super().to_diff_dict().items() if value is not None}
        if isinstance(self.vision_config, StripVisionConfig):
            fields["vision_config"] = self.vision_config.to_diff_dict()
            del fields["vision_config"]["transformers_version"]
        if "dtype" in fields:
            fields["torch_dtype"] = fields["dtype"]
        if "rope_parameters" not in fields:
            fields["rope_scaling"] = None
        return fields

    def _shared_llm_fields(self) -> dict:
        fields = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "hidden_act max_position_embeddings initializer_range rms_norm_eps rope_theta attention_bias "
            "attention_dropout use_cache bos_token_id eos_token_id pad_token_id tie_word_embeddings"
        )
        shared = {name: getattr(self, name) for name in fields.split()}
        if getattr(self, "rope_parameters", None):
            shared["rope_parameters"] = dict(self.rope_parameters)
        return shared

    def language_model_config(self) -> LlamaConfig | GraniteConfig:
        """Configuration of `llm`. Not named `llm_config`, in which transformers and vLLM look for a configuration.

        MiniCPM's language model is Granite's with these multipliers (see arXiv 2404.06395, section 3.2):
        residual branches by `scale_depth / sqrt(layers)`, logits by `dim_model_base / hidden_size`, attention by
        `head_dim ** -0.5`. Its embeddings are multiplied by `scale_emb` outside, in `MiniCPMForCausalLM`. The names
        that MiniCPM itself has for all this are kept beside Granite's, for programs that convert the language model.
        """
        if self.llm_type == "llama3":
            config = LlamaConfig(**self._shared_llm_fields())
        else:
            config = GraniteConfig(
                **self._shared_llm_fields(),
                embedding_multiplier=1.0,
                residual_multiplier=self.scale_depth / self.num_hidden_layers**0.5,
                logits_scaling=self.hidden_size / self.dim_model_base,
                attention_multiplier=(self.hidden_size // self.num_attention_heads) ** -0.5,
                scale_emb=self.scale_emb,
                scale_depth=self.scale_depth,
                dim_model_base=self.dim_model_base,
            )
        config.dtype = self.dtype
        return config

    def vision_tower_config(self) -> StripVisionConfig:
        """Configuration of 2.5's `vpm`; the last layer is dropped when `drop_vision_last_layer` says so."""
        config = copy.deepcopy(self.vision_config)
        if self.drop_vision_last_layer:
            config.num_hidden_layers -= 1
        config.dtype = self.dtype
        return config


def _without_kernels(fields: dict) -> dict:
    kept = {name: value for name, value in fields.items() if name.lstrip("_") not in KERNELS}
    return {name: _without_kernels(value) if isinstance(value, dict) else value for name, value in kept.items()}


MiniCPMVConfig.register_for_auto_class()
