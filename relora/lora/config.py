"""The `lora` section: which weights get adapters, and of what size."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from relora.section import Section

# What has a learning rate of its own, in the optimizer's order: weights of the layers that adapters
# go to, where they train in full; embeddings with the output head; the rest; A and B.
ADAPTER_GROUPS = ("adapters", "undecayed adapters")
GROUPS = ("matrices", "embeddings", "norms and biases", *ADAPTER_GROUPS)
UNDECAYED = ("norms and biases", "undecayed adapters")


class LoRAConfig(Section):
    """Adapters y += s·B·A·x on the chosen weights; embeddings, norms and the head train in full."""

    rank: int = Field(ge=1)
    alpha: float = Field(default=32.0, gt=0)
    scaling: Literal["standard", "rslora"] = "standard"  # s = alpha/r, or alpha/√r
    dropout: float = Field(default=0.0, ge=0, lt=1)
    # Last parts of module names (`q_proj`), or null: every projection of the attention and MLP
    # blocks, that is every linear layer but the output head.
    targets: list[str] | None = Field(default=None, min_length=1)

    # Which factors train between restarts. With b, A stays as it was drawn until the next restart:
    # it has no gradient and no optimizer state, and lies in the base weights' precision.
    train: Literal["both", "b"] = "both"
    # With train: b, layers of one block that read the same input may have the same A, by lists of
    # last parts of names such as [[q_proj, k_proj, v_proj], [gate_proj, up_proj]]; what A makes of
    # the input is then computed and kept once for all of a list.
    share_a: list[list[str]] | None = Field(default=None, min_length=1)

    # How adapted layers are computed, see `graphs`: through r features beside the base's output, or
    # with W + s·B·A in its place. The same function, and other products; auto takes the fewer.
    graph: Literal["auto", "low_rank", "effective"] = "auto"
    # Whether W + s·B·A is formed once a step and kept, which takes the base's bytes once more, or
    # for each micro-batch; null = kept where forming it would cost more than 5 % of its products.
    keep_effective: bool | None = None

    # What the frozen weights are held in for products: codes with a scale for each 64 entries, one
    # byte an entry (int8, fp8) or half of one (nf4), with the exact values beside them in host
    # memory, see `quantised`; null = as deepspeed.precision says.
    base: Literal["int8", "fp8", "nf4"] | None = None

    # Learning rate of adapters; null = optimizer.lr. `relora.lr` is the same for runs that merge.
    lr: float | None = Field(default=None, gt=0)

    # What optimizer.weight_decay acts on: A and B, each by itself, or W + s·B·A as a whole, as in
    # full-rank training. Neither touches norms and biases.
    decay: Literal["factors", "merged"] = "factors"

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
    def scale(self) -> float:
        """The factor s of the adapters' output."""
        return self.alpha / (self.rank if self.scaling == "standard" else self.rank**0.5)
