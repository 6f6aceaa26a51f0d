"""Build the transformer: from a config JSON with weights that depend on the seed alone, or from a
checkpoint directory."""

from __future__ import annotations

import copy
import hashlib
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from relora.errors import ConfigError
from relora.files import read_json
from relora.record.layout import MODEL_JSON
from relora.structure import (
    ModelConfig,
    check_pretrained,
    find_model_directory,
    one_line,
    read_structure,
    refuse_failures,
)

GENERATION_CONFIG = "generation_config.json"


def layer_kind(name: str) -> str:
    """What layers of one kind share of their names: `mlp.c_proj` is not `attn.c_proj`; of experts
    (`down_proj_of_experts[3]`) all."""
    return ".".join(name.partition("[")[0].split(".")[-2:])


def build_model(config: ModelConfig, seed: int) -> PreTrainedModel:
    """The causal language model in fp32 on the CPU, every parameter trainable, without KV cache.

    Weights drawn from scratch come from the CPU's generator right after `torch.manual_seed(seed)`,
    so they depend on the seed alone, not on device, rank, world size or ZeRO stage.

    Raises:
        ConfigError: a `pretrained` directory lacks weights, some or all. (Those of a run are in
            its checkpoints: see `record.loaded.LoadedRun`.)
    """
    torch.manual_seed(seed)
    model = _load_pretrained(config.pretrained) if config.pretrained else _from_config(config)
    free_padding_rows(model, draw=config.pretrained is None)
    return make_trainable(model, config.gradient_checkpointing)


def free_padding_rows(model: nn.Module, draw: bool) -> None:
    """Let every row of the embeddings train, in place: batches here hold no padding.

    torch gives the row of the padding token no gradient, and transformers starts it as zeros; but
    many models pad with EOS, which ends every document.

    Args:
        draw: give a row of zeros values like the others', by a generator of its own.
    """
    for module in model.modules():
        if not isinstance(module, torch.nn.Embedding) or module.padding_idx is None:
            continue
        row = module.weight.data[module.padding_idx]
        module.padding_idx = None
        if draw and not row.any() and len(module.weight) > 1:
            others = module.weight.data
            drawn = torch.empty_like(row).normal_(generator=torch.Generator().manual_seed(0))
            row.copy_(drawn * others.norm() / math.sqrt(others.numel() - row.numel()))


def make_trainable(model: PreTrainedModel, gradient_checkpointing: bool) -> PreTrainedModel:
    """The model in fp32 with every parameter trainable, without KV cache, ready for training."""
    model = model.float().requires_grad_(True)
    model.config.use_cache = False
    if gradient_checkpointing:
        # The reentrant kind would need inputs that require gradients.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def fingerprint(model: nn.Module) -> str:
    """What tells a model's weights from others': SHA-256 of names, shapes and some values of each.

    Up to 1,024 values of a parameter, evenly spread, in fp32: training moves all of them, and a
    large model is told in a moment.
    """
    found = hashlib.sha256()
    for name, param in model.named_parameters():
        flat = param.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, min(1024, flat.numel()), dtype=torch.float64)
        some = flat[places.long().to(flat.device)].float().cpu()
        found.update(f"{name} {tuple(param.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()


def build_empty_model(config: ModelConfig) -> PreTrainedModel:
    """The model that `build_model` would build, with its buffers and without weights: parameters
    are on the meta device, for `engine.memory.give_memory_`."""
    with _without_weights():
        model = _from_config(config)
    free_padding_rows(model, draw=False)
    return make_trainable(model, config.gradient_checkpointing)


@contextmanager
def _without_weights() -> Iterator[None]:
    """Parameters that modules get within it have no memory, and are not drawn."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # which may be another module's, shared
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_meta_model(config: ModelConfig) -> PreTrainedModel:
    """The model's structure alone: parameters without memory, for counting and checking."""
    with torch.device("meta"):
        model = _from_config(config)
    free_padding_rows(model, draw=False)
    return model


def check_causal(config: ModelConfig) -> None:
    """Whether the model predicts each token from those before it alone; by trying.

    Two layers of it are built and run on a few tokens, of which the last is changed: a later token
    must not move an earlier logit. Nothing else about an architecture is believed.

    Raises:
        ConfigError: it looks ahead, or cannot be run on tokens alone.
    """
    structure = load_model_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _shallow(structure).eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    special = _special_ids(structure)
    plain = [n for n in range(vocabulary) if n not in special][:9] or list(range(vocabulary))[:9]
    ids = torch.tensor([(plain * 9)[:8]])
    changed = ids.clone()
    changed[0, -1] = plain[-1]
    where = f"model: {config.config or config.pretrained}: {structure.model_type}"
    try:
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids)
            before = output.logits[:, :-1].float()
            after = model(input_ids=changed).logits[:, :-1].float()
    except Exception as error:  # of any code of any architecture
        raise ConfigError(
            f"{where} cannot be run on tokens alone ({one_line(error)}); take a causal language "
            "model"
        ) from error
    moved = float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))
    if not moved < 1e-3:
        raise ConfigError(
            f"{where} as configured is no causal language model: its logits change with tokens "
            "that come later, so it would learn to copy what it is to predict; take a causal one "
            '(BERT and its like are with "is_decoder": true)'
        )
    expected = float(torch.nn.functional.cross_entropy(before.flatten(0, 1), ids[:, 1:].flatten()))
    if getattr(output, "aux_loss", None) is None and not math.isclose(
        float(output.loss), expected, rel_tol=1e-3
    ):
        raise ConfigError(
            f"{where} trains on another loss than that of the next token ({float(output.loss):.4f} "
            f"where cross-entropy is {expected:.4f}): decoders of translation and speech models "
            "take labels that are shifted already; take a causal language model"
        )


def _shallow(structure: PretrainedConfig) -> PreTrainedModel:
    """The model with two layers, or whole where its config lists things for each layer."""
    small = copy.deepcopy(structure)
    if getattr(small, "num_hidden_layers", 0) > 2:
        try:
            small.num_hidden_layers = 2
            for key, value in vars(small).items():
                if isinstance(value, list) and len(value) == structure.num_hidden_layers:
                    setattr(small, key, value[:2])
            return AutoModelForCausalLM.from_config(small)
        except Exception:  # other code may count on the number of layers
            small = copy.deepcopy(structure)
    return AutoModelForCausalLM.from_config(small)


def _special_ids(structure: PretrainedConfig) -> set[int]:
    """Ids of the tokens that a model's config gives a meaning."""
    found: set[int] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(structure, name, None)
        found |= {value} if isinstance(value, int) else set(value or ())
    return found


def save_structure(config: ModelConfig, directory: Path) -> None:
    """Write what a run keeps of its model beside the weights: all but them.

    The generation settings of pretrained weights (stop tokens, sampling) are among it, so that an
    export has them when what the run started from is long gone.
    """
    load_model_config(config).save_pretrained(directory)
    if config.pretrained is not None:
        settings = find_model_directory(config.pretrained) / GENERATION_CONFIG
        if settings.is_file():
            read_json(settings, ConfigError)
            shutil.copyfile(settings, directory / GENERATION_CONFIG)


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """The transformers config that `model` names, checked as far as no weights are needed.

    Raises:
        ConfigError: the file or directory is not one that transformers can build from.
    """
    if config.config is not None:
        return read_structure(config.config)
    assert config.pretrained is not None
    path = find_model_directory(config.pretrained) / MODEL_JSON
    return read_structure(path, "model.pretrained")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) number of parameters, shared ones counted once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


def _load_pretrained(directory: Path) -> PreTrainedModel:
    check_pretrained(directory)
    structure = load_model_config(ModelConfig(pretrained=directory))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=structure,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # what transformers raises at other people's files may be anything
        raise ConfigError(f"model.pretrained: {directory}: {one_line(error)}") from error
    model, report = loaded
    # transformers would draw these at random and go on.
    lacking = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if lacking:
        raise ConfigError(f"model.pretrained: {directory}: lacks weights: {', '.join(lacking)}")
    return model


def _from_config(config: ModelConfig) -> PreTrainedModel:
    structure = load_model_config(config)
    where = f"model: {config.config or config.pretrained}"
    return refuse_failures(lambda: AutoModelForCausalLM.from_config(structure), where)
