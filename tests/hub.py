"""A stand-in for the Hugging Face hub, on loopback: it takes what is pushed, and keeps it to be looked at."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """`endpoint` is its address, `token` what it lets in, `files` what was committed: {repository: {path: bytes}}.

    As the real one does, it lets `reader`, a token that may only read, ask for what is there, and ignores what a
    second creation of a repository asks for; `private` are those that are. While `full`, it takes no commits.
    """

    def __init__(self, token, reader="hf_reader"):
        self.token, self.reader, self.files, self.private, self.full, self.asked = token, reader, {}, set(), False, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, status, content, code=None):
                body = json.dumps(content).encode()
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                hub.asked.append(self.path)
                name, _, write = self.path.removeprefix("/api/models/").partition("/auth-check")
                known = self.headers.get("Authorization") in (f"Bearer {hub.token}", f"Bearer {hub.reader}")
                if name not in hub.files or not known:
                    self.answer(404, {"error": "Repository not found"}, "RepoNotFound")
                elif write and self.headers["Authorization"] != f"Bearer {hub.token}":
                    self.answer(403, {"error": "You need write access to this repository"})
                else:
                    self.answer(200, {"id": name, "private": name in hub.private})

            do_HEAD = do_GET

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.asked.append(self.path)
                if self.headers.get("Authorization") == f"Bearer {hub.reader}":
                    return self.answer(403, {"error": "You don't have the rights to create a model"})
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.answer(401, {"error": "Invalid username or password."})
                if self.path == "/api/repos/create":
                    wanted = json.loads(body)
                    name = f"{wanted.get('organization') or 'somebody'}/{wanted['name']}"
                    there = name in hub.files
                    if not there and wanted.get("visibility") == "private":
                        hub.private.add(name)
                    hub.files.setdefault(name, {})
                    return self.answer(409 if there else 200, {"url": f"{hub.endpoint}/{name}", "name": name})
                if self.path == "/api/validate-yaml":
                    return self.answer(200, {"errors": [], "warnings": []})
                name, _, what = self.path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")
                if what == "preupload":
                    paths = [file["path"] for file in json.loads(body)["files"]]
                    modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
                    return self.answer(200, {"files": modes})
                if what == "commit" and hub.full:
                    return self.answer(403, {"error": "Storage quota exceeded"})
                if what == "commit":
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            hub.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    return self.answer(200, {"commitOid": "0" * 40, "commitUrl": f"{hub.endpoint}/{name}/commit/0"})
                self.answer(404, {"error": self.path})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
