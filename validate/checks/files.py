"""The files beside the graph: masks, config, tokenizer, and what onnxruntime-genai reads.

With wrong ones, a correct graph prunes the wrong positions, stops at the wrong token, or does not load.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dispc.export.companions import genai_config
from dispc.manifest import COPIED, LICENCE_FILES, MANIFEST, WEIGHTS, WRITTEN, licence_files
from dispc.masks import Masks
from dispc.runtime.providers import PROVIDERS
from dispc.support.errors import ArtifactError, DispcError, first_line
from dispc.support.graph import end_of_weights, read_model, weight_files
from dispc.support.inputs import contents, read_object
from dispc.validate.checks.check import Check, listed
from dispc.validate.comparison import Comparison

COMPANIONS = "files beside the model"
REPORTS = (".xml", ".html", ".md")
"""Endings of what `dispc validate` writes, which may lie beside an artifact: no runtime reads such a file."""
REPORT = re.compile(r"report[\w-]*\.json")
"""Names under which a report may lie there as JSON; runtimes look for some others."""
ABSENT = "nothing"
MODELS = (".onnx", ".ort", ".safetensors", ".bin", ".gguf", ".jinja", ".py")
"""Endings of what other programs look for in hidden folders too: optimum runs the first *.onnx of all."""
MARK = b"\xef\xbb\xbf"
"""A byte order mark, which onnxruntime-genai takes for nonsense."""


def judge_masks(comparison: Comparison) -> Iterator[Check]:
    """The artifact's masks are those that are meant: the ones named by `--masks`, else those beside the reference.

    Masks that were learned again and not compiled pass everything else.
    """
    meant, where = comparison.meant_masks
    if meant is None:
        detail = f"the artifact's own: {where}, and --masks names none"
        yield Check(name="masks", group="static", status="noted", detail=detail)
        return
    difference = first_difference(comparison.masks, meant)
    if difference is None:
        yield Check(name="masks", group="static", status="passed", detail=f"those of {where}")
        return
    own = comparison.directory / "masks.safetensors"
    yield Check.failed(
        "masks",
        "static",
        f"not those of {where}: {difference}; compile again, or judge by the artifact's own with --masks {own} "
        "(the other checks do)",
    )


def first_difference(ours: Masks, meant: Masks) -> str | None:
    """In words; None where both hold the same sets for the same norm scope."""
    if ours.norm_scope != meant.norm_scope:
        return f"norm scope {ours.norm_scope}, meant is {meant.norm_scope}"
    for number, (block, other) in enumerate(zip(ours.blocks, meant.blocks, strict=True)):
        for (name, indices), wanted in zip(block.sets().items(), other.sets().values(), strict=True):
            if not np.array_equal(indices, wanted):
                index = int(np.setxor1d(indices, wanted)[0])
                kept = "keeps" if index in indices else "leaves out"
                sizes = f"{len(indices)} indices, meant are {len(wanted)}"
                return f"block {number} {name} {kept} index {index} ({sizes})"
    return None


def judge_companions(comparison: Comparison) -> Iterator[Check]:
    """Config and tokenizer files are the reference's, no others are there, and genai_config.json is what we write."""
    faults = [*_copied(comparison), *_foreign(comparison), *_hidden(comparison.directory), *_genai(comparison)]
    faults += [*_marked(comparison.directory), *_weights(comparison.directory)]
    if faults:
        yield Check.failed(COMPANIONS, "static", listed(faults))
    else:
        detail = "config, tokenizer and genai_config.json"
        yield Check(name=COMPANIONS, group="static", status="passed", detail=detail)


def _copied(comparison: Comparison) -> Iterator[str]:
    for name in COPIED:
        theirs, ours = comparison.checkpoint.directory / name, comparison.directory / name
        if not theirs.is_file():
            if os.path.lexists(ours):  # a link without its file may lead to one elsewhere
                yield f"{name}: the reference has none"
        elif not ours.is_file():
            yield f"{name} is missing"
        elif not _same(ours, theirs):
            yield f"{name} differs from the reference"


def _foreign(comparison: Comparison) -> Iterator[str]:
    """What no compilation writes. Allowed are reports and hidden files (.git, .gitattributes, .cache)."""
    for path in sorted(comparison.directory.iterdir()):
        if LICENCE_FILES.fullmatch(path.name):
            if not _same(path, comparison.checkpoint.directory / path.name):
                yield f"{path.name}: not the reference's"
        elif path.name not in WRITTEN and not path.name.startswith(".") and not _is_report(path):
            yield f"{path.name}: no file of an artifact, and others may read it"
    for name in licence_files(comparison.checkpoint.directory):
        if not (comparison.directory / name).exists():
            yield f"{name} is missing"


def _same(ours: Path, theirs: Path) -> bool:
    both = ours.is_file() and theirs.is_file()
    return both and contents(ours, ArtifactError) == contents(theirs, ArtifactError)


def _hidden(directory: Path) -> Iterator[str]:
    """Models and code in hidden files and folders (.git and .cache may be there)."""
    for hidden in sorted(directory.glob(".*")):
        inside = hidden.rglob("*") if hidden.is_dir() and not hidden.is_symlink() else ()
        for path in (hidden, *inside):
            if path.suffix in MODELS:
                yield f"{path.relative_to(directory)}: no file of an artifact, and others may read it"


def _weights(directory: Path) -> Iterator[str]:
    """Weights in files with other names than dispc's, which copies of model.onnx* would lack; and what is none."""
    model = read_model(directory / "model.onnx")
    for name in sorted(weight_files(model) - {WEIGHTS}):
        yield f"model.onnx has weights in {name}, not in {WEIGHTS}"
    file = directory / WEIGHTS
    if file.is_file() and (spare := file.stat().st_size - end_of_weights(model)) > 0:
        yield f"{WEIGHTS} has {spare:,} bytes at its end that are no weights"


def _is_report(path: Path) -> bool:
    return path.is_file() and (path.suffix in REPORTS or REPORT.fullmatch(path.name) is not None)


def _genai(comparison: Comparison) -> Iterator[str]:
    """Differences of genai_config.json from what dispc writes for these choices, this model and this graph."""
    try:
        plan = comparison.plan
    except DispcError as error:
        yield f"dispc.json: no choices that a compilation takes ({error})"
        return
    inputs = [value.name for value in comparison.artifact.session.get_inputs()]
    options = PROVIDERS[plan.target.provider].genai_options(graph=plan.cuda_graph, dtype=plan.dtype)
    wanted = genai_config(comparison.checkpoint, plan, comparison.masks.cache_layers, inputs, options)
    try:
        found = read_object(comparison.directory / "genai_config.json", ArtifactError)
    except (ArtifactError, OSError) as error:
        yield f"genai_config.json cannot be read ({first_line(error)})"
        return
    for place, ours, theirs in differences(found, wanted):
        yield f"genai_config.json: {place} is {ours}, expected {theirs}"


def _marked(directory: Path) -> Iterator[str]:
    """What begins with a byte order mark."""
    for path in (directory / "genai_config.json", directory / MANIFEST):
        if path.is_file() and contents(path, ArtifactError).startswith(MARK):
            yield f"{path.name} begins with a byte order mark"


def differences(found: Any, wanted: Any, place: str = "") -> Iterator[tuple[str, str, str]]:
    """Where two values of JSON differ: the place, what was found, and what was wanted."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in dict.fromkeys([*wanted, *found]):
            inner = f"{place}.{key}".removeprefix(".")
            if key not in found:
                yield inner, ABSENT, _short(wanted[key])
            elif key not in wanted:
                yield inner, _short(found[key]), ABSENT
            else:
                yield from differences(found[key], wanted[key], inner)
    elif found != wanted or isinstance(found, bool) != isinstance(wanted, bool):
        yield place or "all of it", _short(found), _short(wanted)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
