"""Serve the page of this folder and an artifact to a browser on this machine:  python serve.py ARTIFACT [PORT]"""

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Handler(SimpleHTTPRequestHandler):
    """This folder, with the artifact as /artifact/."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def __init__(self, *args: Any, artifact: Path, **options: Any) -> None:
        self.artifact = artifact
        super().__init__(*args, directory=str(HERE), **options)

    def translate_path(self, path: str) -> str:
        found = Path(super().translate_path(path))  # has dropped every `..`
        inside = found.relative_to(HERE).parts
        return str(self.artifact.joinpath(*inside[1:]) if inside[:1] == ("artifact",) else found)

    def end_headers(self) -> None:
        # WebAssembly threads share memory, which browsers allow to isolated pages only.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


def make_server(artifact: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server on `port` of this machine only; 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, artifact=artifact.resolve()))


if __name__ == "__main__":
    server = make_server(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8000)
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    server.serve_forever()
