"""A stand-in of the Hugging Face Hub on this machine: what timm, transformers and linsight ask of it over HTTP."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote, urlparse

TOKEN = "hf_secret"


class Hub:
    """repos: by OWNER/NAME, files by branch. log: what was asked. deny: statuses to answer with, by method and path."""

    def __init__(self):
        self.repos, self.private, self.objects, self.log, self.deny, self.messages = {}, {}, {}, [], {}, []

    def add(self, name, files, branch="main"):
        self.repos.setdefault(name, {}).setdefault(branch, {}).update(files)

    def answer(self, method, path, body, headers):
        """Status, headers and content."""
        self.log.append((method, path))
        for (verb, pattern), status in self.deny.items():
            if verb == method and re.search(pattern, path):
                return status, {}, json.dumps({"error": "no"}).encode()
        known = headers.get("Authorization") == f"Bearer {TOKEN}"
        if method == "POST" and not known and path != "/api/validate-yaml":
            return 401, {}, b"{}"
        for verb, pattern, run in _ROUTES:
            found = re.fullmatch(pattern, path)
            if verb == method.replace("HEAD", "GET") and found:
                return run(self, body, *map(unquote, found.groups()))
        return 404, {}, b"{}"

    def resolve(self, body, name, revision, file):
        if name not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        branches = self.repos[name]
        commits = {commit(files): files for files in branches.values()}
        files = branches.get(revision, commits.get(revision))
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        found = {"X-Repo-Commit": commit(files)}
        if file not in files:
            return 404, {**found, "X-Error-Code": "EntryNotFound"}, b""
        return 200, {**found, "ETag": f'"{hashlib.sha256(files[file]).hexdigest()}"'}, files[file]

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.repos:
            return 409, {}, json.dumps({"error": "exists", "url": f"{self.address}/{name}"}).encode()
        self.repos[name], self.private[name] = {"main": {}}, asked.get("visibility")
        return 200, {}, json.dumps({"url": f"{self.address}/{name}", "name": name}).encode()

    def branch(self, body, name, branch):
        self.repos[name][branch] = dict(self.repos[name]["main"])
        return 200, {}, b"{}"

    def preupload(self, body, name, revision):
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": path, "uploadMode": "lfs" if path.endswith("safetensors") else "regular"} for path in files]
        return 200, {}, json.dumps({"files": [{**mode, "shouldIgnore": False} for mode in modes]}).encode()

    def batch(self, body, name):
        found = [
            {**one, "actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        return 200, {}, json.dumps({"transfer": "basic", "objects": found}).encode()

    def put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        return 200, {}, b""

    def commit(self, body, name, revision):
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                self.messages.append(value["summary"])
        self.repos[name][revision].update(files)
        oid = commit(self.repos[name][revision])
        url = f"{self.address}/{name}/commit/{oid}"
        return 200, {}, json.dumps({"commitUrl": url, "commitOid": oid, "success": True}).encode()


def commit(files):
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


_NAME = r"/([^/]+/[^/]+?)"
_ROUTES = [
    ("GET", rf"{_NAME}/resolve/([^/]+)/(.+)", Hub.resolve),
    ("POST", "/api/repos/create", Hub.create),
    ("POST", "/api/validate-yaml", lambda hub, body: (200, {}, b"{}")),
    ("POST", rf"/api/models{_NAME}/branch/([^/]+)", Hub.branch),
    ("POST", rf"/api/models{_NAME}/preupload/([^/]+)", Hub.preupload),
    ("POST", rf"{_NAME}\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", "/lfs/([0-9a-f]+)", Hub.put),
    ("POST", rf"/api/models{_NAME}/commit/([^/]+)", Hub.commit),
]


@contextlib.contextmanager
def serving():
    """A hub that answers at its `address`."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self):
            body = self._chunks() if self.headers.get("Transfer-Encoding") else self.rfile.read(self._length())
            status, headers, content = hub.answer(self.command, urlparse(self.path).path, body, self.headers)
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _length(self):
            return int(self.headers.get("Content-Length") or 0)

        def _chunks(self):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
            return body

        do_GET = do_HEAD = do_POST = do_PUT = _answer

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
