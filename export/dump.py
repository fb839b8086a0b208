"""`--dump-ir`: the graph after each pass, as files to look at."""

import re
from pathlib import Path

import onnx_ir as ir

from dispc.model.weights import surface_weight_errors
from dispc.support.errors import ArtifactError
from dispc.support.files import whole, write_text
from dispc.support.inputs import regular

DUMPED = re.compile(r"\d\d-[a-z0-9-]+\.(onnx|txt)|not-rewritten\.txt")
"""What is written."""
LARGEST_BYTES = 1024
"""Larger weights stay in the checkpoint; the graph only shows their shapes."""


class Dump:
    """The directory that graphs are written into; nowhere where it is None."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def check(self, force: bool) -> None:
        """Raise ArtifactError unless graphs may be written into the directory: over what is there with `force` only."""
        if self.directory is None or not self.directory.exists():
            return
        if not self.directory.is_dir():
            raise ArtifactError(f"--dump-ir {self.directory}: is not a directory")
        older = sorted(path for path in self.directory.iterdir() if DUMPED.fullmatch(path.name))
        if older and not force:
            raise ArtifactError(f"{older[0]}: exists already; use --force to replace it, or choose another --dump-ir")
        for path in older:
            if path.exists():  # a link may lead nowhere
                regular(path, ArtifactError)

    def graph(self, number: int, name: str, model: ir.Model) -> None:
        """Write the graph after pass `number`, as ONNX and as text."""
        if self.directory is None:
            return
        path = self.directory / f"{number:02d}-{name}.onnx"
        with surface_weight_errors():
            proto = ir.to_proto(_without_weights(model))
        with whole(path) as partial:
            partial.write_bytes(proto.SerializeToString())
        write_text(path.with_suffix(".txt"), str(model) + "\n")

    def not_rewritten(self, reasons: list[str]) -> None:
        """Write what the passes left as it was, and why, a line for each."""
        if self.directory is not None:
            write_text(self.directory / "not-rewritten.txt", "".join(f"{line}\n" for line in reasons))


def _without_weights(model: ir.Model) -> ir.Model:
    copy = model.clone()
    for name, value in list(copy.graph.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > LARGEST_BYTES:
            value.const_value = None
            del copy.graph.initializers[name]
            copy.graph.inputs.append(value)
    return copy
