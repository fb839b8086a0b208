"""config.json to a transformers config, and that to a model: the one way that compiler and reference share.

transformers never reads the model directory. What decides what a model computes is taken from the raw file, handed to
the installed release under the names that it knows, and the config is asked whether it holds it. Models are built from
that config and our own tensor reading, with attention named by us: nothing in a directory can name code to run.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from dispc.model.family import Family
from dispc.model.generation import KEYS
from dispc.model.rope import FULL, ROPE_KEYS, SLIDING, Rope, spell_ropes
from dispc.model.values import sensible
from dispc.support.errors import CheckpointError, first_line

HARMLESS = re.compile(
    # what the file is, who wrote it, and with what
    r"model_type|architectures|auto_map|_?(model_)?name_or_path|_commit_hash|transformers_version|torch_dtype|dtype"
    r"|unsloth\w*|transformers\.js_config|is_llama_config|_flash_attn_2_enabled|_?attn_implementation\w*"
    r"|_experts_implementation|use_flash_attn\w*|quantization_config"
    # what is returned and kept, not what is computed
    r"|use_cache|cache_implementation|output_hidden_states|output_attentions|return_dict|torchscript|is_decoder"
    # tokenizer and generation
    r"|\w+_token_ids?|tokenizer_class|tokenizer_model_max_length|model_max_length|max_sequence_length|prefix|suffix"
    rf"|{KEYS.pattern}"
    # training, and heads that a causal language model has not
    r"|initializer_range|init_std|\w*dropout\w*|\w+_pdrop|layerdrop|gradient_checkpointing|pretraining_tp"
    r"|neftune_noise_alpha|finetuning_task|id2label|label2id|num_labels|problem_type|task_specific_params"
)
"""Keys of config.json that do not change what a model computes; they are not handed to transformers."""
ABSENT = re.compile(
    # biases, norms of heads, experts, further heads: tensors tell, each of which must have a place
    r"\w*bias|\w*qk_?(layer)?norm\w*|\w*(moe|expert|router|lora|adapter)\w*|\w*(mtp|nextn)\w*|pooling\w*|pruned_heads"
    # negations: false says that it is there
    r"|(no|not|disable|without)_\w+"
    # kinds of models and inputs that no family here has
    r"|\w*(cross_attention|encoder_decoder|bidirectional|alibi|mrope|mamba|ssm|vision|image|video|audio)\w*"
    r"|rope_interleaved|tf_legacy_loss|chunk_size_feed_forward"
    # numbers and kernels that compute the same
    r"|\w*(quant|fp8|fp16|bf16|fp32|float16|flash|xformers|sdpa|fused|triton|kernel|compile)\w*|pad_vocab\w*"
    # training and the machines that did it
    r"|\w*((pre)?train(ed|ing)|checkpointing|aux_loss|loss_coef|z_loss)\w*"
    r"|\w*(deepspeed|megatron|tensor_parallel|sequence_parallel|wandb)\w*"
)
"""Unknown keys whose false or 0 says that something is not there which is not there anyway. That of any other may
switch off what the family's code does."""
ALWAYS = ("tie_word_embeddings", "head_dim")
"""Keys that models read from every config, also where the signature of its class does not name them."""


def make_config(raw: Mapping[str, Any], family: Family, ropes: Mapping[str, Rope], name: str) -> Any:
    """The transformers config of a raw config.json; `name` is what transformers calls the model in messages.

    Raises:
        CheckpointError: for an unknown key, a value that transformers refuses, or one that it changes.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[family.model_type]
    known, raw = _parameters(config_class), family.settle(raw)
    given = {key: sensible(key, value) for key, value in _deciding(raw, known, family).items()}
    try:
        # No id is handed over: that of the padding would only make a row of the embedding a constant in training.
        config = config_class(**given, **spell_ropes(ropes, known, family), pad_token_id=None, name_or_path=name)
    except CheckpointError:
        raise
    except Exception as error:  # what transformers raises for nonsense shares no base class
        raise CheckpointError(f"transformers cannot read it: {type(error).__name__} {first_line(error)}") from error
    for key, value in given.items():
        if value is not None and getattr(config, key, None) != value and not _switched_off(key, raw):
            raise CheckpointError(
                f"{key} is {value!r}, and the installed transformers makes {getattr(config, key, None)!r} of it"
            )
    _check_kinds(raw.get("layer_types"), config, "layer_types" in known)
    return config


def _check_kinds(said: Any, config: Any, read: bool) -> None:
    """Make sure that `layer_types`, as config.json says them, are those of the model.

    A family whose implementation does not `read` them has a window in every block, or in none.
    """
    window = getattr(config, "sliding_window", None)
    if said is None:
        if window is None and SLIDING in (getattr(config, "layer_types", None) or ()):
            raise CheckpointError(
                f"sliding_window is null, and {config.model_type} models have blocks with one; name it"
            )
        return
    if not read and said != (expected := [FULL if window is None else SLIDING] * config.num_hidden_layers):
        raise CheckpointError(
            f"layer_types is {said!r}, and {config.model_type} models have {len(expected)} blocks, all of them "
            f"{expected[0] if expected else FULL}; correct or remove it"
        )
    if SLIDING in said and getattr(config, "use_sliding_window", True) is False:
        raise CheckpointError(f"layer_types names {SLIDING}, and use_sliding_window is false; correct one of them")
    if SLIDING in said and window is None:
        raise CheckpointError(f"layer_types names {SLIDING}, and there is no sliding_window")


def _parameters(config_class: Any) -> set[str]:
    """The options of a configuration class itself, not those that every class inherits and no decoder here reads."""
    from transformers import PretrainedConfig

    if is_dataclass(config_class) and is_dataclass(PretrainedConfig):  # since release 5
        return {field.name for field in fields(config_class)} - {field.name for field in fields(PretrainedConfig)}
    return set(inspect.signature(config_class).parameters) - {"kwargs"}


def _deciding(raw: Mapping[str, Any], known: set[str], family: Family) -> dict[str, Any]:
    """The keys that decide what the model computes, rotary positions excepted."""
    deciding = {}
    for key, value in raw.items():
        if HARMLESS.fullmatch(key) or key in family.ignored or (key in ROPE_KEYS and family.rotary):
            continue
        if key == "layer_types" and key not in known:  # checked against the config that is made
            continue
        if key in known or key in ALWAYS:
            deciding[key] = value
        elif not _says_nothing(key, value, raw, "sliding_window" in known):
            raise CheckpointError(
                f"{key} is {value!r}, which neither dispc nor the installed transformers knows of {family.model_type} "
                "models; remove it if it changes nothing"
            )
    return deciding


def _says_nothing(key: str, value: Any, raw: Mapping[str, Any], windows: bool) -> bool:
    """Whether an unknown key switches nothing on, nor off, in a family that has `windows` or not."""
    if value in (None, "", [], {}):
        return True
    if value not in (False, 0):
        return False
    about_windows = re.search("window|sliding", key) is not None
    return ABSENT.fullmatch(key) is not None or (about_windows and raw.get("sliding_window", windows or None) is None)


def _switched_off(key: str, raw: Mapping[str, Any]) -> bool:
    """Whether transformers leaves a window out because another key says so (Qwen)."""
    return key == "sliding_window" and not raw.get("use_sliding_window", False)


def model_class(config: Any) -> Any:
    """The causal language model of transformers that a config is of."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping[type(config)]


def build_model(config: Any, dtype: torch.dtype, attention: str) -> Any:
    """A model of `config` in evaluation mode, with values as transformers initialises them.

    Raises:
        CheckpointError: when transformers cannot build it.
    """
    default = torch.get_default_dtype()
    try:
        return model_class(config)._from_config(config, attn_implementation=attention, dtype=dtype).eval()
    except Exception as error:  # what transformers and torch raise for nonsense shares no base class
        reason = f"{type(error).__name__} {first_line(error)}"
        where = f"{config.name_or_path}/config.json"
        raise CheckpointError(f"{where}: transformers cannot build the model ({reason})") from error
    finally:
        torch.set_default_dtype(default)  # transformers 4 leaves its own behind when it fails


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Modules made meanwhile get parameters on the meta device (nothing is allocated or filled), and real buffers."""
    register = nn.Module.register_parameter

    def register_empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is tied is there already, and stays the same
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def set_parameters(
    model: nn.Module,
    read: Callable[[str, tuple[int, ...]], torch.Tensor],
    wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Give the `wanted` parameters of a built model the values that `read` has for their name and shape, one by one."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:  # a tied one has several owners
                owners.setdefault(parameter, []).append((module, key))
    for name, empty in [(name, empty) for name, empty in model.named_parameters() if wanted(name)]:
        value = nn.Parameter(read(name, tuple(empty.shape)), requires_grad=empty.requires_grad)
        for module, key in owners[empty]:
            module._parameters[key] = value
