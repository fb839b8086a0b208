"""What can be said of an artifact without running it: onnx.checker, operator sets, and the files beside the graph."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from dispc.manifest import COPIED
from dispc.model.checkpoint import Checkpoint
from dispc.support.check import Check
from dispc.support.errors import first_line
from dispc.support.graph import MICROSOFT, without_links

COMPANIONS = "files beside the model"
DOMAINS = {"onnx": {""}}
"""Target -> the operator domains that its runtimes know; other targets are for ONNX Runtime."""
ONNX_RUNTIME = {"", MICROSOFT}


def judge_file(path: Path, target: str) -> Check:
    """onnx.checker with full shape inference, and no operator from a domain that the target's runtimes lack."""
    try:
        with without_links(path) as plain:
            onnx.checker.check_model(str(plain), full_check=True)
        model = onnx.load(path, load_external_data=False)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, DecodeError) as error:
        return Check.failed("onnx.checker", "static", f"refuses the model: {first_line(error)}")
    operators = Counter(f"{node.domain}.{node.op_type}".removeprefix(".") for node in model.graph.node)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    unknown = sorted({node.domain for node in model.graph.node} - DOMAINS.get(target, ONNX_RUNTIME))
    unlisted = sorted({node.domain for node in model.graph.node} - set(opsets))
    spelled = ", ".join(f"{domain or 'ai.onnx'} {number}" for domain, number in opsets.items())
    detail = f"IR {model.ir_version}; opsets {spelled}; {len(model.graph.node)} nodes"
    for domains, fault in ((unknown, f"target {target} does not know"), (unlisted, "opset_import lacks")):
        if domains:
            return Check.failed("onnx.checker", "static", f"{fault} the domain {', '.join(domains)}; {detail}")
    figures = {"ir_version": model.ir_version, "opsets": opsets, "operators": dict(operators.most_common())}
    return Check(name="onnx.checker", group="static", status="passed", detail=detail, figures=figures)


def judge_companions(artifact: Path, manifest: Mapping[str, Any], checkpoint: Checkpoint) -> Check:
    """Config and tokenizer are the reference's, and onnxruntime-genai is told the reference's figures.

    Without them the best graph stops at the wrong token, or does not load.
    """
    faults = list(_companion_faults(artifact, manifest, checkpoint))
    if faults:
        return Check.failed(COMPANIONS, "static", "; ".join(faults))
    return Check(name=COMPANIONS, group="static", status="passed", detail="config, tokenizer and genai_config.json")


def _companion_faults(artifact: Path, manifest: Mapping[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    for name in COPIED:
        theirs, ours = checkpoint.directory / name, artifact / name
        if theirs.is_file() and not (ours.is_file() and ours.read_bytes() == theirs.read_bytes()):
            yield f"{name} {'differs from the reference' if ours.is_file() else 'is missing'}"
    config, stops = checkpoint.config, checkpoint.stop_tokens
    for name, told, expected in (("positions", manifest["positions"], config.max_positions),
                                 ("stop_tokens", manifest["stop_tokens"], stops)):  # fmt: skip
        if told != expected:
            yield f"dispc.json: {name} {told}, the reference has {expected}"
    try:
        model = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))["model"]
        told = {name: model[name] for name in ("vocab_size", "context_length", "eos_token_id")}
        told |= {name: model["decoder"][name] for name in ("head_size", "hidden_size", "filename")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"genai_config.json cannot be read ({type(error).__name__})"
        return
    for name, wanted in {
        "vocab_size": config.vocab_size, "context_length": config.max_positions, "eos_token_id": stops or [0],
        "head_size": config.head_dim, "hidden_size": config.hidden_size, "filename": "model.onnx",
    }.items():  # fmt: skip
        if told[name] != wanted:
            yield f"genai_config.json: {name} {told[name]}, the reference has {wanted}"
