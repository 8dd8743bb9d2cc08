"""A stand-in for the Hugging Face hub, on loopback: it takes what is pushed, and keeps it to be looked at."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """`endpoint` is its address, `token` what it lets in, `files` what was committed: {repository: {path: bytes}}."""

    def __init__(self, token):
        self.token, self.files, self.asked = token, {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, status, content):
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                hub.asked.append(self.path)
                self.answer(404, {"error": "nothing to read here"})

            do_HEAD = do_GET

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.asked.append(self.path)
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.answer(401, {"error": "Invalid username or password."})
                if self.path == "/api/repos/create":
                    wanted = json.loads(body)
                    name = f"{wanted.get('organization') or 'somebody'}/{wanted['name']}"
                    hub.files.setdefault(name, {})
                    return self.answer(200, {"url": f"{hub.endpoint}/{name}", "name": name})
                if self.path == "/api/validate-yaml":
                    return self.answer(200, {"errors": [], "warnings": []})
                name, _, what = self.path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")
                if what == "preupload":
                    paths = [file["path"] for file in json.loads(body)["files"]]
                    modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
                    return self.answer(200, {"files": modes})
                if what == "commit":
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            hub.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    return self.answer(200, {"commitOid": "0" * 40, "commitUrl": f"{hub.endpoint}/{name}/commit/0"})
                self.answer(404, {"error": self.path})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
