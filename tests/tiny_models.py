"""Tiny models of any type that transformers can build, from each type's own default config."""

from __future__ import annotations

import re
from typing import Any

VOCABULARY, WIDTH, HEADS, LAYERS, POSITIONS, EXPERTS = 320, 32, 4, 2, 64, 4

# The first pattern that an integer's name matches says its tiny value.
SIZES = (
    (r"vocab_size|n_words|n_token|vocab$", VOCABULARY),
    (r"token_id$|_index$", 1),
    (r"layers$|n_layer$|num_blocks$", LAYERS),
    (r"(key_value|kv|n_kv).*heads|num_kv|head_count_kv", 2),
    (r"heads$|n_head$|num_heads$", HEADS),
    (r"experts_per_tok|top_?k$|moe_k$|topk|experts_per_token", 2),
    (r"expert_group|n_group$|topk_group", 1),
    (r"experts$", EXPERTS),
    (r"position|max_seq|n_ctx|context_length|max_len|seq_len|sliding_window|window", POSITIONS),
    (r"head_dim|d_kv$|kv_channels|key_length|state_size|d_state|rotary_dim", 8),
    (r"lora_rank|_rank$", 8),
    (r"intermediate|ffn_dim|d_inner|inner_size|ff_size|d_ff|n_inner|ffn_hidden", 2 * WIDTH),
    (r"hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|hidden_dim|width|_size$", WIDTH),
)

# What a type wants beyond that, mostly that one size follows from others.
QUIRKS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16},
    "cpmant": {"dim_ff": 64},
    "ctrl": {"dff": 64},
    "falcon_h1": {"mamba_d_head": 16, "mamba_d_ssm": 64},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "xlnet": {"d_head": 8},
    "xlstm": {"embedding_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_head_dim": 16, "num_hidden_layers": 4,
              "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"attention_head_dim": 16, "mamba_headdim": 16},
}  # fmt: skip


def tiny_values(model_type: str, **changes: Any) -> dict[str, Any]:
    """The JSON of a model of 10⁴ to 10⁵ parameters: the type's defaults, every size made small."""
    from transformers import AutoConfig

    values = AutoConfig.for_model(model_type).to_dict()
    for key in ("transformers_version", "architectures"):
        values.pop(key, None)
    return {**_shrunk(values), **QUIRKS.get(model_type, {}), **changes}


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    small = {key: _small(key, value) for key, value in values.items()}
    # Lists with an entry a layer are as long as there are layers; both kinds of them stay.
    for key, value in values.items():
        if isinstance(value, list) and re.search(r"layer|block|pattern|mlp|intermediate", key):
            kinds = list(dict.fromkeys(map(str, value)))
            picked = [next(v for v in value if str(v) == kind) for kind in kinds]
            small[key] = (picked * LAYERS)[:LAYERS]
    if "per_layer_config" in values:  # by number of the layer
        small["per_layer_config"] = {}
    if "kv_lora_rank" in values:  # such attention has keys for every head
        small["num_key_value_heads"] = HEADS
    return small


def _small(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return _shrunk(value)
    if isinstance(value, list) and key.endswith("token_id"):  # several ends of a text
        return sorted({_small(key, each) for each in value})
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, size in SIZES:
        if re.search(pattern, key):
            return min(size, value) if value > 0 else value
    return value
