"""A stand-in for the hub on this machine: repositories in memory, at the addresses that `huggingface_hub` asks for.

It knows one caller, "me", by one token, and takes no files for a repository that is called "full".
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_stand_in"
COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """Serves while it is a context.

    Attributes:
        files: repository → path → bytes.
        private: the repositories that were made private.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.private = {}, set()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def environment(self, cache):
        """What a process has to be told that is to use it."""
        told = {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_TOKEN": TOKEN, "HF_HOME": str(cache)}
        return told | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def digest(body):
    return hashlib.sha1(body).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, as far as an upload and a download ask."""

    def log_message(self, *_):
        pass

    def say(self, status, value=None, body=None, **headers):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in ({"Content-Length": len(body), "X-Repo-Commit": COMMIT} | headers).items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, why, code=""):
        self.say(status, {"error": why}, X_Error_Message=why, X_Error_Code=code)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Invalid credentials")
        files, parts = self.server.files, unquote(self.path).strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            said = json.loads(body)
            name = f"{said.get('organization') or 'me'}/{said['name']}"
            if name in files:
                return self.say(409, {"error": "exists", "url": f"{self.address}/{name}"})
            files[name] = {}
            if said.get("private") or said.get("visibility") == "private":
                self.server.private.add(name)
            return self.say(200, {"url": f"{self.address}/{name}", "id": name})
        if parts == ["api", "validate-yaml"]:
            return self.say(200, {"errors": [], "warnings": []})
        repository, what = "/".join(parts[2:4]), parts[4]
        if repository not in files:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        if what == "preupload":
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self.say(200, {"files": [how | {"path": each["path"]} for each in json.loads(body)["files"]]})
        if repository.endswith("/full"):
            return self.refuse(403, "Private repository storage limit reached")
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        address = f"{self.address}/{repository}/commit/{COMMIT}"
        return self.say(200, {"success": True, "commitOid": COMMIT, "commitUrl": address})

    def do_GET(self):
        parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if parts[0] == "api":
            files = self.server.files.get("/".join(parts[2:4]))
            if files is None:
                return self.refuse(404, "Repository not found", "RepoNotFound")
            if parts[4:5] == ["tree"]:
                kind = {"type": "file"}
                rows = [kind | {"path": name, "size": len(body), "oid": digest(body)} for name, body in files.items()]
                return self.say(200, rows)
            names = [{"rfilename": name} for name in files]
            return self.say(200, {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": names})
        body = self.server.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
        if body is None:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        return self.say(200, body=body, ETag=f'"{digest(body)}"')

    do_HEAD = do_GET

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"
