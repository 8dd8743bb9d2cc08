"""A stand-in for the Hugging Face hub, on loopback, to load from: slow, cut off half-way, busy or closed, as told."""

import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class ShakyHub:
    """Gives the repositories in the folder `root`: `models/owner/name/...` and `datasets/owner/name/...`.

    `fault(path, times)` is asked before each answer, with the path and how often it was asked for: an HTTP status to
    answer with, "cut" to break off half-way, "hang" to say nothing for ten minutes, or None. `asked` are all paths.
    """

    def __init__(self, root):
        self.fault, self.asked, self.open = lambda path, times: None, Counter(), True
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, content, status=200, cut=False, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if cut else content)
                if cut:
                    self.close_connection = True

            def do_GET(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = unquote(self.path.split("?")[0])
                hub.asked[f"{self.command} {path}"] += 1
                fault = hub.fault(path, hub.asked[f"{self.command} {path}"])
                if fault == "hang":
                    time.sleep(600)
                if isinstance(fault, int):
                    codes = {401: "GatedRepo", 404: "RepoNotFound"}
                    return self.answer(b'{"error": "told to"}', fault, X_Error_Code=codes.get(fault, "Busy"))
                parts = path.strip("/").split("/")
                if parts[0] == "api":
                    kind, repo, rest = parts[1], "/".join(parts[2:4]), parts[4:]
                    folder = Path(root, kind, repo)
                    if not folder.is_dir():
                        return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
                    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
                    if rest[:1] == ["tree"]:
                        under = "/".join(rest[2:])
                        files = [file for file in files if file.startswith(under)]
                        tree = [
                            {"type": "file", "path": file, "oid": "0" * 40, "size": (folder / file).stat().st_size}
                            for file in files
                        ]
                        folders = {str(Path(file).parent) for file in files} - {".", under}
                        tree += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
                        return self.answer(json.dumps(tree).encode())
                    info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                    info |= {"tags": [], "private": False, "gated": False}
                    return self.answer(json.dumps(info).encode())
                kind = parts.pop(0) if parts[0] == "datasets" else "models"
                file = Path(root, kind, *parts[:2], *parts[4:])
                if not file.is_file():
                    known = file.parents[len(parts[4:]) - 1].is_dir()
                    return self.answer(b"", 404, X_Error_Code="EntryNotFound" if known else "RepoNotFound",
                                       X_Repo_Commit=COMMIT)  # fmt: skip
                content = file.read_bytes()
                headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": COMMIT}
                if begin := self.headers.get("Range", "").removeprefix("bytes=").rstrip("-"):
                    headers["Content_Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
                    return self.answer(content[int(begin) :], 206, **headers)
                self.answer(content, cut=fault == "cut", **headers)

            do_HEAD = do_POST = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
