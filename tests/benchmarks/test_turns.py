"""Graphs are timed in turns, each in a process of its own."""

from pathlib import Path

import harness
import pytest
import turns

from dispc.compiler import CompileOptions, compile_model


def test_each_graph_has_a_time_in_each_round_and_a_missing_one_is_named(tmp_path: Path) -> None:
    model = harness.checkpoint("llama").directory
    graphs = {}
    for name in ("a", "b"):
        compile_model(
            CompileOptions(model=model, output=tmp_path / name, target="onnx-cpu", dense=True, validate=False)
        )
        graphs[name] = tmp_path / name / "model.onnx"
    found = turns.time_steps(graphs, model, past=4, threads=1, rounds=2, calls=3)
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}
    assert all(time > 0 for times in found.values() for time in times)
    with pytest.raises(RuntimeError, match=r"nowhere\.onnx"):
        turns.time_steps({"c": tmp_path / "nowhere.onnx"}, model, past=4, threads=1, rounds=1, calls=1)
