"""`relora export`: a merged model as a directory that transformers loads; or adapters and
their base as one that PEFT loads."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from relora.data.tokenizer import load_tokenizer
from relora.data.transformers_tokenizer import place_tokenizer
from relora.errors import CheckpointError, ConfigError
from relora.files import making, supplied
from relora.lora.choose import find_targets, projections
from relora.lora.inject import remove_adapters
from relora.lora.kinds import kind_of
from relora.lora.layers import adapted_layers
from relora.lora.names import names_of
from relora.lora.peft_format import (
    SETTINGS,
    TASKS,
    AdapterWeights,
    adapter_of,
    write_adapter,
)
from relora.model import GENERATION_CONFIG
from relora.record.layout import RunDirectory
from relora.record.loaded import LoadedRun, load_run
from relora.record.model_card import CARD, model_card
from relora.structure import has_transformers_weights

BASE = "base"  # the directory of what adapters are on


class Form(NamedTuple):
    """What an export is to be.

    Attributes:
        format: hf, one merged model; peft, the run's adapters beside the base that they are on;
            delta, what the run has changed as adapters beside what it began with.
        dtype: of the written weights; merging happens in fp32 in any case.
        rank: of delta, of every layer.
        tolerance: of delta, the largest relative Frobenius error of a layer; instead of a rank.
        max_shard_size: of a file of weights, as transformers reads it: 5GB.
        license: the Hub's identifier of the licence that the model is under; by default that of the
            base model's card, if there is one.
    """

    format: Literal["hf", "peft", "delta"] = "hf"
    dtype: str = "float32"
    rank: int | None = None
    tolerance: float | None = None
    max_shard_size: str = "50GB"
    license: str | None = None


def export(
    path: Path,
    to: Path,
    format: Literal["hf", "peft", "delta"],
    dtype: str,
    rank: int | None,
    tolerance: float | None,
    max_shard_size: str,
    force: bool,
    license: str | None = None,
) -> int:
    """Write model, tokenizer, generation config and model card to `to`.

    Args:
        format, dtype, rank, tolerance, max_shard_size, license: see `Form`.
        force: replace what is there.

    Raises:
        ConfigError: something else is there; the form asks for what the run does not have.
    """
    form = Form(format, dtype, rank, tolerance, max_shard_size, license)
    _check_form(form)
    check_target(to, force)
    run = load_run(path)
    if form.format == "hf":
        model, adapter = run.merged_model(), None
    elif form.format == "peft":
        model = run.adapted_model()
        if not any(adapted_layers(model)):
            raise ConfigError(f"--format peft: {run.checkpoint.directory} has no adapters; take hf")
        for name, layer in adapted_layers(model):
            if layer.has_blocks:
                raise ConfigError(
                    f"--format peft: {name} has blocks and no A and B; take hf, or delta"
                )
            with torch.no_grad():  # the base that adapters add to
                layer.weight.mul_(layer.shrink)
        adapter = adapter_of(model)
        remove_adapters(model)
    else:
        model, adapter = difference(run, form)
    model = model.to(getattr(torch, form.dtype))
    write_export(to, run, model, form, adapter)
    print(f"{to}: step {run.checkpoint.step} of {run.run_dir}, {form.dtype}; load it with")
    if adapter is None:
        print(f'    AutoModelForCausalLM.from_pretrained("{to}")')
    else:
        print(f'    peft.AutoPeftModelForCausalLM.from_pretrained("{to}")')
        sizes = [
            sum(file.stat().st_size for file in x.glob("*.safetensors")) for x in (to, to / BASE)
        ]
        print(f"adapters {sizes[0]:,} bytes, base {sizes[1]:,}: {sizes[0] / sizes[1]:.1%}")
    return 0


def _check_form(form: Form) -> None:
    if form.format != "delta" and (form.rank, form.tolerance) != (None, None):
        raise ConfigError("--rank, --tolerance: are of --format delta; remove them, or take it")
    if re.fullmatch(r"[0-9]+([KMGT]i?B)", form.max_shard_size) is None:
        raise ConfigError(
            f"--max-shard-size: {form.max_shard_size}: must be a whole number with "
            "its unit, such as 500MB or 5GB"
        )
    if form.license is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", form.license) is None:
        raise ConfigError(
            f"--license: {form.license[:80]!r}: must be an identifier as the Hugging Face Hub has "
            "them: apache-2.0, mit, cc-by-4.0, llama3.1, other"
        )
    if form.format == "delta" and (form.rank is None) == (form.tolerance is None):
        raise ConfigError("--format delta: say either --rank R or --tolerance E (0.1 is a tenth)")


def difference(run: LoadedRun, form: Form) -> tuple[PreTrainedModel, AdapterWeights]:
    """What a run has done to its matrices, as adapters of low rank beside a base: there those
    matrices are as in the beginning, and all else is as in the end.

    Singular vectors and values of W_end − W_start, the largest ones: by Eckart and Young no other
    matrix of that rank is nearer.

    Raises:
        ConfigError: see `LoadedRun.first_model`.
    """
    end = run.merged_model()
    start = run.first_model()
    names = find_targets(end, run.config.lora) if run.config.lora else list(projections(end))
    factors, scales, wanted, missed, least = {}, {}, 0.0, 0.0, 0.0
    for name in names:
        layer: Any = end.get_submodule(name)
        kind: Any = kind_of(layer)
        begin = start.get_parameter(names_of(name).weight)
        with torch.no_grad():
            delta = kind.matrix(layer.weight.double() - begin.double())
            u, sizes, v = torch.linalg.svd(delta, full_matrices=False)
            rank = _rank_of(sizes, form)
            root = sizes[..., :rank].sqrt()
            b = (u[..., :rank] * root[..., None, :]).float()
            a = (root[..., None] * v[..., :rank, :]).float()
            wanted += sizes.square().sum().item()
            least += sizes[..., rank:].square().sum().item()
            missed += (delta - b.double() @ a.double()).square().sum().item()
            layer.weight.copy_(begin)
        factors[name], scales[name] = (a, b), 1.0
    total = max(wanted, 1e-300)
    ranks = [b.shape[-1] for _, b in factors.values()]
    count = sum(b.shape[:-2].numel() for _, b in factors.values())
    error, best = (missed / total) ** 0.5, (least / total) ** 0.5
    print(
        f"W_end - W_start of {count} matrices at rank {min(ranks)} to {max(ranks)}: relative "
        f"Frobenius error {error:.3e}, the best possible {best:.3e}"
    )
    return end, AdapterWeights(factors, scales, {})


def _rank_of(sizes: Tensor, form: Form) -> int:
    """How many singular values are kept: so many, or until the others are small enough.

    Args:
        sizes: all of a matrix, (n,), or of each expert's, (E, n), which have one rank.
    """
    count = sizes.shape[-1]
    if form.rank is not None:
        return min(form.rank, count)
    assert form.tolerance is not None
    squares = sizes.square().view(-1, count).sum(0)
    left = squares.flip(0).cumsum(0).flip(0)  # of the values from each one on
    small = left <= (form.tolerance**2) * left[0]
    return max(1, count - int(small.sum()))


def write_export(
    to: Path,
    run: LoadedRun,
    model: PreTrainedModel,
    form: Form,
    adapter: AdapterWeights | None = None,
) -> None:
    """Write all files of an export, or none; an earlier one stays until the new one is whole.

    Raises:
        CheckpointError: they cannot be written (the disk is full, say), or the run has lost some.
    """
    tokenizer = load_tokenizer(run.tokenizer_dir, CheckpointError)
    model.config.use_cache = True
    set_special_tokens(model, tokenizer, RunDirectory(run.run_dir).model)
    target = Path(os.path.realpath(to))  # a link goes on to be one
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with making(target, replace=True) as temporary:
            base = temporary if adapter is None else temporary / BASE
            model.save_pretrained(base, max_shard_size=form.max_shard_size)
            place_tokenizer(run.tokenizer_dir, base, CheckpointError)
            if adapter is not None:
                place_tokenizer(run.tokenizer_dir, temporary, CheckpointError)
                write_adapter(adapter, model, temporary, str(target / BASE), TASKS["CausalLM"])
            below = BASE if adapter is not None else None
            card = model_card(run, model, form.dtype, form.license, below)
            (temporary / CARD).write_text(card, encoding="utf8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"--to: {to}: the export cannot be written: {error}; what was there is as it was; make "
            "room, or choose another directory"
        ) from None


def set_special_tokens(model: PreTrainedModel, tokenizer: Any, structure: Path) -> None:
    """Give the model's configs the tokenizer's BOS, EOS and padding, in place.

    Generation settings that the run started from (several stop tokens, sampling) stay as they are;
    the tokenizer fills what they lack.

    Args:
        structure: the run's `model/`, which has them if there were any.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    given = GenerationConfig(**special)
    if (structure / GENERATION_CONFIG).is_file():
        given = GenerationConfig.from_pretrained(structure)
        for name in names:
            if getattr(given, name) is None:
                setattr(given, name, special[name])
    model.generation_config = given
    for name in names:
        old = getattr(model.config, name, None)
        # A list of stop tokens that has the tokenizer's among it says more.
        if not (isinstance(old, list) and special[name] in old):
            setattr(model.config, name, special[name])


def check_target(to: Path, force: bool) -> None:
    """Whether an export may be written to `to`: nothing is there, or an earlier one and `force`.

    Raises:
        ConfigError: something else is there, such as the run itself.
    """
    with supplied(ConfigError, f"--to: {str(to)[:300]}"):
        if not to.exists() or (to.is_dir() and not any(to.iterdir())):
            return
    is_export = has_transformers_weights(to) or (to / SETTINGS).is_file()
    if not (is_export and (to / CARD).is_file()):
        raise ConfigError(f"--to: {to} exists and is no export; choose another directory")
    if not force:
        raise ConfigError(f"--to: {to} exists; choose another directory, or --force to replace it")
