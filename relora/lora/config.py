"""The `lora` section: which weights get adapters, and of what size."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from relora.section import Section

# What has a learning rate of its own, in the optimizer's order: weights of the layers that adapters
# go to, where they train in full; embeddings with the output head; the rest; A and B.
ADAPTER_GROUPS = ("adapters", "undecayed adapters")
GROUPS = ("matrices", "embeddings", "norms and biases", *ADAPTER_GROUPS)
UNDECAYED = ("norms and biases", "undecayed adapters")
# The layer of a tensor of all experts' weights is named after it, see `experts`.
OF_EXPERTS = "_of_experts"

# What PEFT calls these settings.
NAMES_OF_PEFT = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
}


class LoRAConfig(Section):
    """Adapters y += s·B·A·x on the chosen weights; embeddings, norms and the head train in full."""

    rank: int | None = Field(default=None, ge=1)
    """Rank r of A (r, in) and B (out, r); either this or `blocks`."""
    blocks: int | None = Field(default=None, ge=2, le=256)
    """In place of a rank: k blocks of W train by themselves, each a k-th of its rows by a k-th of
    its columns, one in each band of either, so 1/k of W's entries and any rank at once. A restart
    moves every block on by one band."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapters' output is scaled by s = alpha / rank."""
    scaling: Literal["standard", "rslora"] = "standard"
    """standard: s = alpha/r; rslora: s = alpha/√r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the adapters' input alone."""
    targets: list[str] | None = Field(default=None, min_length=1)
    """Last parts of module names (`q_proj`), or null: every projection of the attention and MLP
    blocks, that is every linear layer but the output head, and the weights of experts. Embeddings
    and convolutions get adapters where they are named."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default={})
    """Rank by layer: {regular expression that the name ends in: rank}; the first that matches
    counts, as in PEFT."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """Alpha by layer, likewise."""
    bias: Literal["all", "none"] = "all"
    """Whether the biases of the layers that adapters go to train, as those of all others do."""
    train: Literal["both", "b"] = "both"
    """Which factors train between restarts. With b, A stays as it was drawn until the next restart:
    it has no gradient and no optimizer state, and lies in the base weights' precision."""
    share_a: list[list[str]] | None = Field(default=None, min_length=1)
    """With train: b, layers of one block that read the same input may have the same A, by lists of
    last parts of names such as [[q_proj, k_proj, v_proj], [gate_proj, up_proj]]; what A makes of
    the input is then computed and kept once for all of a list."""
    graph: Literal["auto", "low_rank", "effective"] = "auto"
    """How adapted layers are computed: through r features beside the base's output (low_rank), or
    with W + s·B·A in its place (effective). The same function, and other products; auto takes the
    fewer."""
    keep_effective: bool | None = None
    """Whether W + s·B·A is formed once a step and kept, which takes the base's bytes once more, or
    for each micro-batch; null = kept where forming it would cost more than 5 % of its products."""
    base: Literal["int8", "fp8", "nf4"] | None = None
    """What products read the frozen weights as: codes with a scale for each 64 entries, one byte an
    entry (int8, fp8) or half of one (nf4), with the exact values beside them in host memory; null =
    as deepspeed.precision says."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate of adapters in runs without merges; null = optimizer.lr. With merges it is
    relora.lr."""
    decay: Literal["factors", "merged"] = "factors"
    """What optimizer.weight_decay acts on: A and B, each by itself, or W + s·B·A as a whole, as in
    full-rank training. Neither touches norms and biases."""

    @model_validator(mode="before")
    @classmethod
    def _takes_pefts_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        both = [name for name in values if values.get(NAMES_OF_PEFT.get(name, "")) is not None]
        if both:
            raise ValueError(f"{both[0]} is {NAMES_OF_PEFT[both[0]]} here, which is given too")
        return {NAMES_OF_PEFT.get(name, name): value for name, value in values.items()}

    @model_validator(mode="after")
    def _has_a_size(self) -> LoRAConfig:
        if (self.rank is None) == (self.blocks is None):
            raise ValueError(
                "give the size of the adapters as either rank or blocks, and null for the other"
            )
        if self.blocks is None:
            return self
        of_factors = ("alpha", "scaling", "dropout", "train", "share_a")
        for key in (*of_factors, "rank_pattern", "alpha_pattern"):
            if getattr(self, key) != LoRAConfig.model_fields[key].default:
                raise ValueError(
                    f"{key} is of A and B, and would do nothing with blocks; remove it"
                )
        if self.graph == "low_rank":
            raise ValueError("graph: low_rank is of A and B; take auto or effective with blocks")
        return self

    @model_validator(mode="after")
    def _has_sound_patterns(self) -> LoRAConfig:
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{pattern!r} is no regular expression ({error}); take the end of a layer's "
                    "name, such as q_proj or layers.0.self_attn.q_proj"
                ) from None
        return self

    @model_validator(mode="after")
    def _shares_what_does_not_train(self) -> LoRAConfig:
        if self.share_a is None:
            return self
        if self.train == "both":
            raise ValueError("share_a wants train: b, since an A that trains is its layer's own")
        names = [name for group in self.share_a for name in group]
        if len(set(names)) < len(names) or min(map(len, self.share_a)) < 2:
            raise ValueError("share_a wants lists of two names or more, each name once")
        return self

    @property
    def size(self) -> str:
        """How large the adapters are, in words."""
        patterned = " but by patterns" if self.rank_pattern or self.alpha_pattern else ""
        return f"{self.blocks} blocks" if self.blocks else f"rank {self.rank}{patterned}"

    def for_layer(self, name: str) -> LoRAConfig:
        """The same with the rank and alpha of the layer of this name, and without patterns."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        own = {
            "rank": _first_match(self.rank_pattern, name, self.rank),
            "alpha": _first_match(self.alpha_pattern, name, self.alpha),
        }
        return self.model_copy(update={**own, "rank_pattern": {}, "alpha_pattern": {}})

    def shapes(self, outputs: int, inputs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of A and B of a matrix (out, in)."""
        if self.blocks is not None:
            return (self.blocks,), (self.blocks, outputs // self.blocks, inputs // self.blocks)
        assert self.rank is not None
        return (self.rank, inputs), (outputs, self.rank)

    def entries(self, outputs: int, inputs: int) -> tuple[int, int]:
        """How many A and B of a matrix (out, in) have."""
        a, b = self.shapes(outputs, inputs)
        return math.prod(a), math.prod(b)

    @property
    def scale(self) -> float:
        """The factor s of the adapters' output; blocks have none."""
        if self.rank is None:
            return 1.0
        return self.alpha / (self.rank if self.scaling == "standard" else self.rank**0.5)


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a layer's name, or an end of it behind a dot, is what a regular expression says."""
    return re.match(rf"(.*\.)?({pattern})({OF_EXPERTS})?$", name) is not None


def _first_match(patterns: dict[str, Any], name: str, default: Any) -> Any:
    return next((v for key, v in patterns.items() if pattern_matches(key, name)), default)
