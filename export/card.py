"""The model card: README.md of an artifact, and the licence files of the model that it was made from.

Every figure is one of dispc.json or of the masks' own metadata; a fact that is missing there is left out.
"""

import codecs
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from dispc.manifest import Manifest, licence_files
from dispc.masks import SETS, Masks, set_width
from dispc.model.checkpoint import Checkpoint
from dispc.model.config import DecoderConfig
from dispc.support.errors import CheckpointError
from dispc.support.files import real, write_text
from dispc.support.inputs import contents
from dispc.support.printable import markdown_cell
from dispc.targets import TARGETS

CARRIED = ("license", "license_name", "license_link", "language")
"""What the front matter of the base model's card says that is true of the artifact as well."""
TAGS = ["onnx", "onnxruntime", "onnxruntime-genai", "dispc", "disp-llm"]
FRONT_MATTER = 2**20
"""Bytes of a card that are looked at for it: results of benchmarks in it take some hundred thousand."""
OF_THEM = re.compile(rb"[\"']?(?:%s)[\"']? *:" % b"|".join(map(str.encode, CARRIED)))
ITEMS = re.compile(rb"\s|- |#|$")
"""How a line begins that belongs to the key above."""
MASK_FACTS = ("method", "data", "pruning_ratio", "ratio_of", "steps", "seed")
PAPER = "DISP-LLM ([arXiv 2410.11988](https://arxiv.org/abs/2410.11988))"

CARD = """\
---
{front_matter}
---

# {title}

{name} compiled to ONNX by dispc {dispc}. {pruned}

{facts}

## Load it

Inputs are `input_ids`, `attention_mask`, `position_ids` where the model has them, and
`past_key_values.N.key` and `.value` (batch, key/value heads, past length, head size; empty at first);
outputs are `logits` and `present.N.key` and `.value`, which the next call takes as its past.

ONNX Runtime; batches are padded on the {padding}:

```python
import onnxruntime as ort

session = ort.InferenceSession("model.onnx", providers=["{provider}"])
```

{others}

## Masks

{masks}

## Parity

{parity}

## Widths

{widths}

## Licence

{licence}
"""
OTHERS = """\
onnxruntime-genai{genai_build}; batches are padded on the right, as it does by default:

```python
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
```

optimum; {optimum_batches}:

```python
from optimum.onnxruntime import ORTModelForCausalLM

model = ORTModelForCausalLM.from_pretrained(".", provider="{provider}")
{optimum_fix}```"""
"""How applications load it that are not ONNX Runtime alone."""
OTHERS_IN = {
    "bfloat16": (
        "ONNX Runtime multiplies bfloat16 matrices on CUDA only; neither onnxruntime-genai nor optimum was seen "
        "running such an artifact (`dispc compile --dtype float16` makes one that they take)."
    )
}
"""What stands there instead, by dtype."""
OPTIMUM_BATCHES = {
    "left": 'batches are padded on the left (`padding_side="left"` of the tokenizer)',
    "right": (
        "one prompt at a time: `generate` wants batches padded on the left, and would get nonsense from this artifact "
        "(`dispc compile --padding left` makes one that takes them)"
    ),
}
"""Which batches optimum can feed, by the side that an artifact is padded on."""
OPTIMUM_HEAD_SIZE = (
    "model.embed_size_per_head = {size}  # optimum-onnx 0.1.0 takes hidden_size / heads, which is wrong here\n"
)
OPTIMUM_HEADS = "model.num_key_value_heads = {heads}  # optimum-onnx 0.1.0 takes all heads, which is wrong here\n"


def write_card(checkpoint: Checkpoint, masks: Masks, manifest: Manifest, genai_build: str, directory: Path) -> None:
    """Write README.md into an artifact whose `manifest` is complete, and copy the base model's licence files.

    `genai_build` says which build of onnxruntime-genai it needs, empty for any.
    """
    config, model = checkpoint.config, checkpoint.directory
    for file in licence_files(model):
        (directory / file).write_bytes(contents(model / file, CheckpointError))
    name = hub_name(model) or real(model).name
    provider = TARGETS[manifest.target].provider_of(manifest.dtype)
    blocks = manifest.block_parameters
    pruned = (
        f"Pruned in the way of {PAPER}: every attention and MLP reads from, works in and adds into its own subset of "
        f"dimensions. {blocks.share} of the block parameters are kept."
    )
    facts = {
        "base model": name,
        "family": manifest.model_type,
        "target": f"{manifest.target} ({provider})",
        "dtype": manifest.dtype,
        "batches are padded on the": manifest.padding,
        "attention": manifest.attention,
        "positions": f"{manifest.positions:,}",
        "block parameters kept": f"{blocks.kept:,} of {blocks.dense:,} ({blocks.share})",
        "size of model.onnx and its data": f"{manifest.bytes:,} bytes",
        "runs in": str(manifest.needs),
    }
    if manifest.quantisation:
        facts["quantised"] = str(manifest.quantisation)
    full = [f"{part} of {set_width(part, config.hidden_size, config.intermediate_size)}" for part in SETS]
    widths = ((str(i), *(str(row[part]) for part in SETS)) for i, row in enumerate(manifest.widths))
    facts |= {f"note {number}": note for number, note in enumerate(manifest.notes, start=1)}
    others = OTHERS.format(
        optimum_batches=OPTIMUM_BATCHES[manifest.padding],
        genai_build=f" ({genai_build})" if genai_build else "",
        optimum_fix=optimum_fix(config),
        provider=provider,
    )
    text = CARD.format(
        front_matter=front_matter(model).to_yaml(),
        title=f"{markdown_cell(name)}, {manifest.target}, {manifest.dtype}",
        name=markdown_cell(name),
        dispc=manifest.dispc,
        pruned=pruned if blocks.kept < blocks.dense else "Nothing is pruned.",
        facts=_table(("", ""), facts.items()),
        provider=provider,
        padding=manifest.padding,
        others=OTHERS_IN.get(manifest.dtype, others),
        masks=_masks(masks),
        parity=_parity(manifest.validation),
        widths=_table(("block", *full), widths),
        licence=_licence(model),
    )
    write_text(directory / "README.md", str(ModelCard(text)))


def optimum_fix(config: DecoderConfig) -> str:
    """Lines of code that tell optimum what it does not read off config.json; nothing where it does."""
    lines = ""
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        lines += OPTIMUM_HEAD_SIZE.format(size=config.head_dim)
    if not config.family.optimum_reads_heads and config.num_key_value_heads != config.num_attention_heads:
        lines += OPTIMUM_HEADS.format(heads=config.num_key_value_heads)
    return lines


def front_matter(model: Path) -> ModelCardData:
    """What the Hugging Face hub reads; `unknown` is its own word for a licence that is not known."""
    facts: dict[str, Any] = dict(base_card(model))
    if "license" not in facts:
        files = licence_files(model)
        facts |= {"license": "other", "license_link": files[0]} if files else {"license": "unknown"}
    if name := hub_name(model):
        facts["base_model"] = name
    return ModelCardData(**facts, library_name="onnxruntime", pipeline_tag="text-generation", tags=TAGS)


def base_card(model: Path) -> dict[str, str | list[str]]:
    """What the front matter of a model directory's README.md has of CARRIED; empty when it cannot be read."""
    try:
        raw = contents(model / "README.md", CheckpointError)[:FRONT_MATTER].removeprefix(codecs.BOM_UTF8)
        content = yaml.load(_carried(raw).decode(), _PlainLoader)
    except Exception:  # no front matter, no text, no YAML: what PyYAML raises for values of a type shares no base class
        return {}
    if not isinstance(content, Mapping):
        return {}

    def words(value: object) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(word, str) for word in value))

    return {str(key): value for key, value in content.items() if value and words(value)}


def _carried(card: bytes) -> bytes:
    """The lines of the front matter with the keys in CARRIED and what belongs to them.

    Raises:
        ValueError: when the card has no front matter.
    """
    first, *lines = [line.rstrip() for line in card.splitlines()] or [b""]
    carried, kept = False, []
    for line in lines[: lines.index(b"---") if first == b"---" else 0]:
        carried = bool(OF_THEM.match(line)) or (carried and ITEMS.match(line) is not None)
        kept += [line] if carried else []
    return b"\n".join(kept)


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without merges (`<<`), of which a kilobyte may stand for gigabytes: to it that is no key."""

    def flatten_mapping(self, node: Any) -> None:
        pass


def hub_name(model: Path) -> str | None:
    """ORGANISATION/MODEL, where the directory lies in the cache of the Hugging Face hub; nothing else names it."""
    snapshots = real(model).parent  # models--ORGANISATION--MODEL/snapshots/COMMIT
    kind, *name = snapshots.parent.name.split("--")
    return "/".join(name) if (snapshots.name, kind) == ("snapshots", "models") and name else None


def _licence(model: Path) -> str:
    named, files = base_card(model).get("license"), licence_files(model)
    copied = f" Copied from it: {', '.join(f'[{name}]({name})' for name in files)}." if files else ""
    if named:
        return f"That of the base model, whose card says: {markdown_cell(named)}.{copied}"
    if files:
        return f"That of the base model.{copied}"
    return (
        "That of the base model, which is not known: its directory held neither a model card that names a licence nor "
        "a licence file. Find it out before you pass this on."
    )


def _masks(masks: Masks) -> str:
    figures = sorted(key for key in masks.metadata if "perplexity" in key)
    facts = {key: masks.metadata[key] for key in (*MASK_FACTS, *figures) if key in masks.metadata}
    facts |= {"norm_scope": masks.norm_scope, "sha256": masks.sha256()}
    return _table(("", ""), ((key.replace("_", " "), value) for key, value in facts.items()))


def _parity(validation: Mapping[str, Any] | None) -> str:
    if validation is None:
        return "Not checked when this was written. `dispc validate . --reference MODEL` does it."
    rows = ((c["name"], c["status"], _number(c["figure"]), _limit(c), c["detail"]) for c in validation["checks"])
    verdict = "Passed" if validation["passed"] else "FAILED"
    return (
        f"{verdict}, judged on {markdown_cell(validation['judged_on'])}. The truth is the masked PyTorch "
        f"model: {markdown_cell(validation['truth'])}. Errors are in units of the error of the dtype itself in the "
        "same model, at the worst position.\n\n" + _table(("check", "", "figure", "limit", "over"), rows)
    )


def _number(figure: float | None) -> str:
    """A figure that is not finite is null in JSON."""
    return "" if figure is None else f"{figure:.3g}"


def _limit(check: Mapping[str, Any]) -> str:
    return "" if check["limit"] is None else f"{check['limit']:.3g} {check['unit']}".strip()


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(markdown_cell(cell) for cell in line)} |" for line in lines)
