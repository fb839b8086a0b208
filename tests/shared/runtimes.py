"""The programs of examples/, run the way their first lines say."""

import os
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[2] / "examples"
JAVASCRIPT = ROOT / "javascript"
EXAMPLES = ("onnxruntime", "genai", "optimum", "node", "browser")


def say(example: str, artifact: Path, prompt: str, limit: int) -> str:
    """What `example` answers with at most `limit` tokens; skips the test when something it needs is not installed."""
    runner = {"node": _node, "browser": _browser}.get(example, _python)
    return runner(example, artifact, prompt, limit).removesuffix("\n")


def _python(example: str, artifact: Path, prompt: str, limit: int) -> str:
    """In this process: importing torch and transformers once is enough."""
    if example != "onnxruntime":
        pytest.importorskip({"genai": "onnxruntime_genai", "optimum": "optimum.onnxruntime"}[example])
    script = next(ROOT.glob(f"{example}_*.py"))
    arguments = [str(script), str(artifact), prompt, "--max-new-tokens", str(limit)]
    with patch.object(sys, "argv", arguments), redirect_stdout(StringIO()) as out:
        runpy.run_path(str(script), run_name="__main__")
    return out.getvalue()


def _node(example: str, artifact: Path, prompt: str, limit: int) -> str:
    return _run_node("generate.mjs", str(artifact), prompt, "--max-new-tokens", str(limit))


def _browser(example: str, artifact: Path, prompt: str, limit: int) -> str:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed: make setup-web (as root), or install it yourself")
    with served(artifact) as port:
        return _run_node("ask.mjs", f"http://127.0.0.1:{port}/", prompt, str(limit), CHROMIUM=chromium)


@contextmanager
def served(artifact: Path) -> Iterator[int]:
    """The page of examples/javascript and `artifact` on a port of this machine."""
    make_server = runpy.run_path(str(JAVASCRIPT / "serve.py"))["make_server"]
    with patch("http.server.BaseHTTPRequestHandler.log_message"), make_server(artifact) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def _run_node(script: str, *arguments: str, **environment: str) -> str:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (JAVASCRIPT / "node_modules").is_dir():
        pytest.skip("examples/javascript has no node_modules: make setup-web")
    command = [node, str(JAVASCRIPT / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
