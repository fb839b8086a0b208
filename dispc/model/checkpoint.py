"""A Hugging Face model directory as lazy tensors: names, shapes and dtypes at once, values one tensor at a time.

Nothing in the directory is ever executed: safetensors, or `torch.load(weights_only=True)` for `.bin` files.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dispc.manifest import COPIED, LICENCE_FILES
from dispc.masks import Masks
from dispc.model.config import DecoderConfig
from dispc.model.families import find_family
from dispc.model.family import HEAD, Family
from dispc.model.generation import Generation
from dispc.model.packed import packed_in, take
from dispc.model.pretrained import build_model, empty_parameters, make_config, model_class, set_parameters
from dispc.model.rope import Rope, check_ropes, read_ropes
from dispc.model.storage import ADAPTERS, INDICES, CheckpointTensor, Stored, list_stored
from dispc.support.errors import CheckpointError, UnsupportedModelError
from dispc.support.inputs import contents, naming, read_object

SPARE_TENSORS = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq"  # computed from config.json
    r"|.*\.attention\.(bias|masked_bias)"  # the causal mask, as GPT-NeoX once stored it
    r"|(.*\.)?position_ids"
)
"""Tensors that old releases of transformers stored, and that no model reads."""
MISSED = (*COPIED, *ADAPTERS, *INDICES, "model.safetensors", "masks.safetensors", "README.md")
"""Files of a model directory without which, or without licence files, something else is made of it."""


class Checkpoint:
    """A model directory: config.json plus weights.

    Raises:
        CheckpointError: when a file is missing, corrupt, or named outside the directory.
        UnsupportedModelError: when dispc cannot compile this kind of model.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such model directory")
        self.directory = directory
        _require_links(directory)
        self.raw_config = _read_json(directory / "config.json")
        try:
            self.family: Family = find_family(self.raw_config)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{directory / 'config.json'}: {error}") from None

    @cached_property
    def pretrained_config(self) -> Any:
        """The transformers config object, which fills in the family's defaults; see `make_config`."""
        ropes = self.ropes  # whose errors name the file already
        with self._naming_config():
            return make_config(self.raw_config, self.family, ropes, str(self.directory))

    @cached_property
    def ropes(self) -> dict[str, Rope]:
        """The rotary positions of each kind of block, from the raw config.json."""
        with self._naming_config():
            return read_ropes(self.raw_config, self.family)

    @contextmanager
    def _naming_config(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory / 'config.json'}: {error}") from error

    def check_rotary(self, module: torch.nn.Module) -> None:
        """Make sure that the rotary modules in `module`, built by transformers, are those of config.json.

        Raises:
            CheckpointError: when they are not.
        """
        ropes, config = self.ropes, self.config
        with self._naming_config():
            unused = set(ropes) - set(config.layer_kinds) if len(ropes) > 1 else ()
            check_ropes(module, ropes, config.head_dim, unused)

    def load_model(self, dtype: torch.dtype) -> Any:
        """The dense torch model in evaluation mode: transformers' code, every parameter read by `find`, in `dtype`.

        Raises:
            CheckpointError: when a tensor is missing or misshapen, or transformers reads the config in another way.
        """
        model = self.empty_model(dtype)
        set_parameters(model, lambda name, shape: self.parameter(name, shape).to(dtype))
        return model

    def parameter(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The values of a parameter as they are stored; a mapped file is read where they are looked at.

        Raises:
            CheckpointError: when the tensor is missing or misshapen.
        """
        return self.find(name).expect(shape).read()

    def empty_model(self, dtype: torch.dtype) -> Any:
        """The same with its parameters on the meta device: nothing is read yet but names, shapes and config.

        Raises:
            CheckpointError: when a tensor has no place, or transformers reads the config in another way.
        """
        with empty_parameters():
            model = build_model(self.pretrained_config, dtype, self.family.attention)
        self.check_rotary(model)
        self.require_places(name for name, _ in model.named_parameters())
        return model

    @cached_property
    def config(self) -> DecoderConfig:
        try:
            return DecoderConfig.from_pretrained(self.pretrained_config, self.family)
        except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{self.directory / 'config.json'}: {error}") from error

    @cached_property
    def config_sha256(self) -> str:
        return hashlib.sha256(contents(self.directory / "config.json", CheckpointError)).hexdigest()

    @cached_property
    def weights_sha256(self) -> str:
        """Of the files with the weights, one after another; they are read once for it."""
        digest = hashlib.sha256()
        for path in sorted({tensor.file for tensor in self.stored.values()}):
            with naming(path), path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @cached_property
    def generation(self) -> Generation:
        """How text is to be generated, from generation_config.json (where there is one) and config.json.

        Raises:
            CheckpointError: when one of them has an id or a number that cannot be.
        """
        path = self.directory / "generation_config.json"
        content = _read_json(path) if path.exists() else None
        try:
            return Generation.of(content, self.raw_config, self.config.vocab_size)
        except CheckpointError as error:
            raise CheckpointError(f"{path if path.exists() else self.directory / 'config.json'}: {error}") from error

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end a generation; empty when neither config has any."""
        return self.generation.stops

    @property
    def notes(self) -> list[str]:
        """Settings and adapters in the directory that other programs apply and an artifact does not contain."""
        notes = self._notes_of_code
        if not self.stop_tokens:
            notes.append(
                "neither config names a token that ends a text (eos_token_id): an application must say when to stop"
            )
        named = "generation_config.json" if (self.directory / "generation_config.json").exists() else "config.json"
        if left_out := self.generation.left_out:
            notes.append(
                f"{named} sets {', '.join(left_out)}, which genai_config.json cannot say; "
                "an application that wants it must see to it"
            )
        if overruled := self.generation.overruled:
            notes.append(
                f"config.json sets {', '.join(overruled)}, which is left out, as transformers does beside "
                "generation_config.json; set it there if it is meant"
            )
        recovered = (self.directory / "recovery.json").exists()  # dispc recover merges its adapter, and keeps it beside
        if not recovered and (
            adapters := sorted(path.parent.name for path in self.directory.glob("*/adapter_config.json"))
        ):
            notes.append(f"the adapter in {', '.join(adapters)} is no part of the model that is compiled")
        return notes

    @property
    def _notes_of_code(self) -> list[str]:
        """What config.json says of its code, where that is not what is compiled."""
        ours, said = model_class(self.pretrained_config).__name__, self.raw_config.get("architectures")
        classes = [str(name) for name in (said if isinstance(said, list) else [said] if said else [])]
        notes = []
        if classes and ours not in classes:
            notes.append(f"config.json says that it is a {', '.join(classes)}; what is compiled is a {ours}")
        if self.raw_config.get("auto_map"):
            notes.append(f"config.json names code of its own (auto_map), which is not run; transformers' {ours} is")
        return notes

    @property
    def own_masks(self) -> Masks | None:
        """The sets of a model that was pruned by other code; None for a dense model."""
        return None

    @property
    def tensors(self) -> Mapping[str, CheckpointTensor]:
        """Every tensor by name, in the shape of the dense model; headers are read, values are not."""
        return self.stored

    @property
    def stored(self) -> dict[str, CheckpointTensor]:
        """Every weight as it stands in the files; headers are read, values are not."""
        return self._listed.tensors

    @cached_property
    def _listed(self) -> Stored:
        return list_stored(self.directory)

    def find(self, name: str) -> CheckpointTensor:
        """The tensor of parameter `name`, looking through tied embeddings and the bare base model's names.

        Raises:
            CheckpointError: when the checkpoint has no such tensor.
        """
        if (packed := packed_in(name, self.family)) is not None:
            return take(self.find(packed.name), packed, self.config)
        embedding, head = f"{self.family.embedding}.weight", f"{self.family.head}.weight"
        names = [head, HEAD] if name in (head, HEAD) else [name]
        if self.config.tied and name in (embedding, head, HEAD):
            names = [embedding, head, HEAD]
        for candidate in (spelled for one in names for spelled in (one, one.removeprefix(self._base))):
            if candidate in self.tensors:
                return self.tensors[candidate]
            if candidate in self._listed.others:
                raise CheckpointError(
                    f"{self.directory}: tensor {candidate} is stored as {self._listed.others[candidate]}; dispc reads "
                    "float32, float16, bfloat16 and float64, and no quantised weights"
                )
        raise CheckpointError(f"{self.directory}: tensor {name} is missing from the checkpoint")

    @property
    def _base(self) -> str:
        """What stands before the names of a bare base model's tensors in those of the causal language model."""
        return f"{self.family.layers.partition('.')[0]}."

    def require_places(self, parameters: Iterable[str]) -> None:
        """Make sure that the model uses every stored tensor; `parameters` are its names, of one block of each kind.

        Raises:
            CheckpointError: for a tensor without a place in the model, or a tied head that is not the embedding.
        """
        blocks = re.compile(rf"{re.escape(self.family.layers)}\.(0|[1-9][0-9]{{0,5}})(\..*)")

        def place(name: str) -> str:
            """The name without its block's number, which must be that of a block."""
            block = blocks.fullmatch(name)
            return f"*{block[2]}" if block and int(block[1]) < self.config.num_hidden_layers else name

        wholes = [packed.name if (packed := packed_in(name, self.family)) else name for name in parameters]
        heads = {f"{self.family.head}.weight"} | ({HEAD} if self.config.tied else set())
        known = {place(name) for name in wholes} | heads
        every = {*self.stored, *self._listed.others}
        for name in sorted(every):
            full = name if place(name) in known else self._base + name
            if SPARE_TENSORS.fullmatch(name) or (place(full) in known and (full == name or full not in every)):
                continue
            raise CheckpointError(
                f"{self.directory}: tensor {name} has no place in the model that config.json describes; correct "
                "config.json (a bias to declare, a block to count?), or remove the tensor"
            )
        self._require_tied_head()

    def _require_tied_head(self) -> None:
        if not self.config.tied:
            return
        embedding = self.find(f"{self.family.embedding}.weight")
        for name in dict.fromkeys((f"{self.family.head}.weight", HEAD)):
            head = self.stored.get(name)
            other = head is not None and head is not embedding and not _equal(head, embedding)
            if other or name in self._listed.others:
                raise CheckpointError(
                    f"{self.directory}: {name} is not the embedding, which config.json makes the head "
                    "(tie_word_embeddings); set that to false, or remove the tensor"
                )


def _require_links(directory: Path) -> None:
    """Raise CheckpointError for a link to nowhere, which would count as a file that is not there."""
    for path in sorted(directory.iterdir()):
        missed = path.name in MISSED or LICENCE_FILES.fullmatch(path.name)
        if missed and path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path}: is a link that leads nowhere; fetch the file, or remove the link")


def _equal(one: CheckpointTensor, other: CheckpointTensor) -> bool:
    return one.shape == other.shape and torch.equal(one.read(), other.read())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, CheckpointError)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a model directory needs it") from error
