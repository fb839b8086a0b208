"""An artifact in ONNX Runtime: tokens in, logits and caches out, padded on the side that the artifact declares."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dispc.lowerings import LOWERINGS
from dispc.manifest import WEIGHTS, Manifest, read_manifest
from dispc.runtime.edits import Edit, exactly_comparable, load_graph, serialise, widen, with_float32_outputs
from dispc.runtime.ort import ort
from dispc.runtime.providers import CPU, Provider
from dispc.support.arrays import Array, Tokens
from dispc.support.dtypes import BY_ORT
from dispc.support.errors import ArtifactError, first_line
from dispc.support.graph import read_model, require_beside, weight_files
from dispc.targets import TARGETS

FOLDED = {"session.disable_quant_qdq": "1"}
"""Session config with which what DequantizeLinear gives of constants is computed once, when the graph is loaded."""


class Artifact:
    """A loaded artifact, on one provider.

    bfloat16 graphs, and float16 graphs with ScatterND(add), have no CPU kernels, and the CPU's float16 kernels round
    otherwise than CUDA's: on the CPU such artifacts run with every weight widened to float32, which keeps the rounding
    of the weights, not that of the arithmetic. `widened` forces or forbids that; None: as the provider needs.
    `edit` may change the graph before it is loaded (the drill adds outputs); the files stay as they are. `exact` loads
    the graph that can be compared closely at every position: without int8 activations, and with all logits.

    Raises:
        ArtifactError: when the directory is no artifact, or ONNX Runtime cannot load it.
    """

    def __init__(
        self,
        directory: Path,
        threads: int = 0,
        *,
        provider: Provider = CPU,
        edit: Edit | None = None,
        exact: bool = False,
        widened: bool | None = None,
        **options: Any,
    ) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        self.padding = self.manifest.padding
        self.dtype = self.manifest.dtype
        self.positions = self.manifest.positions
        self.stop_tokens = frozenset(self.manifest.stop_tokens)
        self.provider = provider
        self.widened = is_widened(self.manifest, provider) if widened is None else widened
        path = directory / "model.onnx"
        if not path.exists():
            raise ArtifactError(f"{path}: no such file")
        require_beside(path, weight_files(read_model(path)))
        quantisation = self.manifest.quantisation
        self.int8_activations = quantisation is not None and quantisation.int8_activations
        self.last_logits = self.manifest.logits == "last"
        if exact and (self.int8_activations or self.last_logits):
            edit = exactly_comparable(edit)
            options["config"] = FOLDED | (options.get("config") or {})
        if self.dtype == "bfloat16" and not self.widened:
            edit = with_float32_outputs(edit)
        options |= {"threads": threads, "provider": provider}
        if self.widened:
            with tempfile.TemporaryDirectory(prefix="dispc-widened-") as scratch:
                wide, model = Path(scratch) / "model.onnx", widen(load_graph(path))
                if edit:
                    edit(model)
                ir.save(model, wide, external_data=WEIGHTS)
                self.session = open_session(wide, **options)
        else:
            self.session = open_session(path, edit=edit, **options)
        self.runner = Runner(self.session, self.padding)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Array, "State"]:
        """Run prompts of any lengths as one batch; logits [B,V] of each row's last token, and the state to go on."""
        lengths = np.array([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        ids, mask = np.zeros((2, len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            where = slice(width - len(prompt), width) if self.padding == "left" else slice(0, len(prompt))
            ids[row, where], mask[row, where] = prompt, 1
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        logits, caches = self.runner.run(ids, mask, positions, self.runner.empty_caches(len(prompts)))
        state = State(caches, mask, lengths)
        last = np.full(len(prompts), width - 1) if self.padding == "left" else lengths - 1
        last = np.minimum(last, logits.shape[1] - 1)  # with --last-logits there is one position
        return logits[np.arange(len(prompts)), last], state

    def step(self, tokens: Tokens, state: "State") -> tuple[Array, "State"]:
        """Feed one token [B] per row after `state`; logits [B,V] and the next state."""
        lengths = state.lengths + 1
        if self.padding == "left":
            mask = np.concatenate([state.mask, np.ones((len(tokens), 1), dtype=np.int64)], axis=1)
        else:  # a row's tokens are the first `length` positions of its cache
            total = state.mask.shape[1] + 1
            mask = (np.arange(total)[None] < lengths[:, None]).astype(np.int64)
        logits, caches = self.runner.run(tokens[:, None], mask, (lengths - 1)[:, None], state.caches)
        return logits[:, -1], State(caches, mask, lengths)


def is_widened(manifest: Manifest, provider: Provider) -> bool:
    """Whether `provider` runs an artifact with its weights widened to float32."""
    if manifest.dtype not in provider.dtypes:
        return True
    target = TARGETS.get(manifest.target)
    foreign = target is not None and target.provider != provider.name
    half = manifest.dtype != "float32"
    lowering = LOWERINGS.get(manifest.lowering.name)
    runs = lowering is not None and lowering.runs(provider.name, manifest.dtype)
    return provider.fallback and half and (foreign or not runs)


@dataclass(frozen=True)
class State:
    """What a batch carries from step to step: caches, attention mask [B,T], and tokens seen per row."""

    caches: dict[str, Array]
    mask: Tokens
    lengths: npt.NDArray[np.int64]


class Runner:
    """Feeds a session by the names of the artifact's interface. With `padding`, masks of the other side are refused."""

    def __init__(self, session: Any, padding: str | None = None) -> None:
        self.session = session
        self.padding = padding
        self.inputs = {value.name: value for value in session.get_inputs()}
        self.outputs = [value.name for value in session.get_outputs()]
        self.caches = [name for name in self.inputs if name.startswith("past_key_values.")]
        for name in self.caches:
            if self.inputs[name].type not in BY_ORT or len(self.inputs[name].shape) != 4:
                raise ArtifactError(f"model.onnx: its input {name} is no cache of keys or values")

    def empty_caches(self, batch: int) -> dict[str, Any]:
        """Caches without a position: arrays, or OrtValues where numpy does not know the dtype (bfloat16)."""
        caches: dict[str, Any] = {}
        for name in self.caches:
            value = self.inputs[name]
            shape, element = [batch, value.shape[1], 0, value.shape[3]], BY_ORT[value.type].onnx
            if element == ir.DataType.BFLOAT16:
                caches[name] = ort.OrtValue.ortvalue_from_shape_and_type(shape, int(element))
            else:
                caches[name] = np.zeros(shape, dtype=element.numpy())
        return caches

    def run(self, ids: Tokens, mask: Tokens, positions: Tokens, caches: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        """float32 logits [B,S,V], and the caches for the next call.

        Raises:
            ArtifactError: when ONNX Runtime fails, or the mask is padded on the side that the artifact does not take.
        """
        if "logits" not in self.outputs:
            raise ArtifactError("model.onnx: it has no output logits")
        outputs, caches = self.run_all(ids, mask, positions, caches)
        return outputs["logits"], caches

    def run_all(
        self, ids: Tokens, mask: Tokens, positions: Tokens, caches: dict[str, Any]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """As `run`, with everything but the caches by name, in float32."""
        if self.padding == "right":
            refuse_left_padding(mask)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | caches
        feeds = {name: value for name, value in given.items() if name in self.inputs}
        try:
            if any(isinstance(value, ort.OrtValue) for value in feeds.values()):
                wrapped = {name: _ort_value(value) for name, value in feeds.items()}
                results = self.session.run_with_ort_values(None, wrapped)
            else:
                results = self.session.run(None, feeds)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ArtifactError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error
        named = dict(zip(self.outputs, results, strict=True))
        presents = {name: named.pop(name) for name in self.outputs if name.startswith("present.")}
        return (
            {name: _array(value).astype(np.float32) for name, value in named.items()},
            {name.replace("present.", "past_key_values."): value for name, value in presents.items()},
        )


def refuse_left_padding(mask: Tokens) -> None:
    """A mask [B,T] must be ones, then zeros: `GroupQueryAttention` counts the ones and would read the wrong positions.

    Raises:
        ArtifactError: naming the first row that is padded on the left.
    """
    rows = np.flatnonzero((mask[:, 1:] > mask[:, :-1]).any(axis=1))
    if len(rows):
        raise ArtifactError(
            f"attention_mask: row {rows[0]} has a zero before a one; this artifact takes padding on the right "
            "(compile with --padding left for the other side)"
        )


def _ort_value(value: Any) -> Any:
    return value if isinstance(value, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))


def _array(value: Any) -> Array:
    array: Array = value.numpy() if isinstance(value, ort.OrtValue) else value
    return array


def open_session(
    path: Path,
    *,
    optimise: bool = True,
    threads: int = 0,
    provider: Provider = CPU,
    provider_options: dict[str, str] | None = None,
    config: dict[str, str] | None = None,
    profile: Path | None = None,
    optimised_model: Path | None = None,
    edit: Edit | None = None,
) -> Any:
    """An ONNX Runtime session on one provider, with the CPU after it for what that provider leaves.

    `config` are session config entries; `profile` is the prefix of a profile, `optimised_model` the file for the graph
    that is run. With `edit`, the changed graph is loaded from memory and its weights from where they lie.

    Raises:
        ArtifactError: when the model cannot be loaded, or not on that provider.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and printed in one line
    options.intra_op_num_threads = threads
    entries = dict(config or {})
    if threads:  # this session is timed, perhaps alternately with others: spin, but only while it runs
        entries.setdefault("session.force_spinning_stop", "1")
    else:  # let waiting threads sleep, others may want the cores
        entries.setdefault("session.intra_op.allow_spinning", "0")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if optimised_model:
        options.optimized_model_filepath = str(optimised_model)
    source: str | bytes = str(path)
    if edit:
        model = load_graph(path)
        edit(model)
        source, folders = serialise(model)
        if len(folders) > 1:
            raise ArtifactError(f"{path}: its weights lie in several directories ({', '.join(map(str, folders))})")
        entries["session.model_external_initializers_file_folder_path"] = str(next(iter(folders), path.parent))
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    providers: dict[str, dict[str, str]] = {provider.name: provider.exact_options | (provider_options or {})}
    providers.setdefault(CPU.name, {})
    try:
        session = ort.InferenceSession(source, options, providers=list(providers.items()), enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise ArtifactError(f"{path}: ONNX Runtime cannot load the model: {first_line(error)}") from error
    if provider.name not in session.get_providers():
        raise ArtifactError(f"{path}: ONNX Runtime left {provider} out; dispc doctor says why")
    return session
