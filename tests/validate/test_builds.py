"""Whatever build of ONNX Runtime is installed, a validation runs and says which."""

import pytest
from artifacts import originals

from dispc.runtime.build import Build
from dispc.validate import CheckOptions, check


@pytest.mark.parametrize("names", [("onnxruntime",), ("onnxruntime-gpu", "onnxruntime"), ()])
def test_the_build_of_onnx_runtime_is_in_the_report(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuple(Build(name=name, version="1.2.3", files=1, missing=0, changed=0) for name in names)
    monkeypatch.setattr("dispc.validate.comparison.builds", lambda: found)
    good, _, model = originals()
    report = check(good, model, CheckOptions(quick=True))
    assert report.passed
    assert {name for name in report.versions if name.startswith("onnxruntime")} == set(names)
