"""A small model hub on loopback, for pushes and pulls by the genuine huggingface_hub.

It speaks git LFS for large files (HF_HUB_DISABLE_XET=1), keeps everything in memory, and can be told to fail.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

USER = "ada"
GOOD_TOKEN = "hf_good"
READ_ONLY_TOKEN = "hf_read_only"
LFS_SUFFIXES = (".safetensors", ".bin", ".png")


@dataclass
class Repository:
    """Files of every commit by path, as bytes, and the commits of branches."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch, "")
        sha = hashlib.sha1(repr((parent, sorted(files), len(self.commits))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def find(self, revision: str) -> str:
        sha = revision if revision in self.commits else self.branches.get(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]


class Refusal(Exception):
    """A status, with the message and the code of the hub's errors, and more of the answer."""

    def __init__(self, status: int, message: str, code: str = "", **more):
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


class Hub:
    """The server. Use as a context manager; `url` is its address.

    Attributes:
        repositories: By id.
        requests: Number of requests of each kind, as "POST commit".
        uploads: SHA-256 of every object that arrived completely, in order.
        failing_upload: From which upload on (counted from 1) connections are cut in the middle; None for never.
        corrupted: Paths whose contents are served with a flipped bit.
        messages: Messages of the commits, in order.
        refused_yaml: Error that `validate-yaml` answers with, if not empty.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.uploads: list[str] = []
        self.started_uploads = 0
        self.messages: list[str] = []
        self.failing_upload: int | None = None
        self.corrupted: set[str] = set()
        self.refused_yaml = ""
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False, branch: str = "main") -> str:
        """Put a repository, or a commit to it, there without a push."""
        return self.repositories.setdefault(repo_id, Repository(private)).commit(branch, files)


class _Handler(BaseHTTPRequestHandler):
    """Each function of `_ROUTES` returns the body of its answer, JSON or bytes, and may raise a Refusal."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        self.more_headers = {}
        body = b"" if self.command == "PUT" else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status = 200
        try:
            for methods, pattern, function in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods:
                    with self.hub.lock:
                        self.hub.requests[f"{self.command} {function.__name__}"] += 1
                    self.body = body
                    answer = function(self, *match.groups())
                    break
            else:
                raise Refusal(404, f"the test hub knows no {self.command} {path}")
        except Refusal as refusal:
            status, answer = refusal.status, {"error": refusal.message, **refusal.more}
            self.more_headers = {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code}
        if answer is None:  # the connection was cut
            return
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**self.more_headers, "Content-Length": str(len(content))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_GET

    def token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, GOOD_TOKEN, READ_ONLY_TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def check_writable(self, repo_id: str = USER + "/") -> None:
        """A pull request may be opened in any repository."""
        if self.token() is None:
            raise Refusal(401, "Invalid username or password.")
        own = repo_id.startswith(f"{USER}/") or self.query.get("create_pr") == ["1"]
        if self.token() != GOOD_TOKEN or not own:
            raise Refusal(403, "this token may not write")

    def repository(self, repo_id: str) -> Repository:
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.private and self.token() is None):
            raise Refusal(401 if self.token() is None else 404, "Repository not found", "RepoNotFound")
        self.token()
        return found

    def whoami(self):
        self.check_writable()
        return {"name": USER, "type": "user"}

    def create(self):
        payload = json.loads(self.body)
        repo_id = f"{payload.get('organization') or USER}/{payload['name']}"
        self.check_writable(repo_id)
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", url=url)
        private = payload.get("visibility") == "private" or bool(payload.get("private"))
        self.hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private)
        return {"url": url}

    def validate_yaml(self):
        if self.hub.refused_yaml:
            raise Refusal(400, self.hub.refused_yaml, errors=[{"message": self.hub.refused_yaml}])
        return {"errors": [], "warnings": []}

    def branch(self, repo_id, name):
        self.check_writable(repo_id)
        branches = self.repository(repo_id).branches
        if name in branches:
            raise Refusal(409, "Reference already exists")
        branches[name] = branches["main"]
        return {}

    def preupload(self, repo_id, revision):
        self.check_writable(repo_id)
        repository = self.repository(repo_id)
        there = repository.commits[repository.find(revision)]
        files = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            lfs = path.endswith(LFS_SUFFIXES)
            entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            files.append(entry | ({"oid": (_sha256 if lfs else _git_sha)(there[path])} if path in there else {}))
        return {"files": files}

    def batch(self, repo_id):
        self.check_writable()
        objects = []
        for entry in json.loads(self.body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/upload/{entry['oid']}"}}}
            known = entry["oid"] in self.hub.objects
            objects.append({"oid": entry["oid"], "size": entry["size"], **({} if known else upload)})
        return {"transfer": "basic", "objects": objects}

    def upload(self, oid):
        with self.hub.lock:
            self.hub.started_uploads += 1
            cut = self.hub.failing_upload is not None and self.hub.started_uploads >= self.hub.failing_upload
        length = int(self.headers["Content-Length"])
        content = self.rfile.read(length // 2 if cut else length)
        if cut:
            self.close_connection = True
            self.connection.close()
            return None
        assert _sha256(content) == oid
        with self.hub.lock:
            self.hub.objects[oid] = content
            self.hub.uploads.append(oid)
        return b""

    def commit(self, repo_id, revision):
        self.check_writable(repo_id)
        repository = self.repository(repo_id)
        files = dict(repository.commits[repository.find(revision)])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "header":
                self.hub.messages.append(value["summary"])
        answer = {}
        if self.query.get("create_pr") == ["1"]:
            repository.pull_requests += 1
            revision = f"refs/pr/{repository.pull_requests}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{repository.pull_requests}"
        sha = repository.commit(revision, files)
        return {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha, **answer}

    def info(self, repo_id, revision="main"):
        repository = self.repository(repo_id)
        sha = repository.find(revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        return {"id": repo_id, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}

    def tree(self, repo_id, revision):
        repository = self.repository(repo_id)
        entries = []
        for path, content in sorted(repository.commits[repository.find(revision)].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git_sha(content)}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def resolve(self, repo_id, revision, path):
        repository = self.repository(repo_id)
        sha = repository.find(revision)
        content = repository.commits[sha].get(path)
        if content is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        self.more_headers = {"X-Repo-Commit": sha, "ETag": f'"{_git_sha(content)}"'}
        if path.endswith(LFS_SUFFIXES):
            self.more_headers |= {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
        return content[:-1] + bytes([content[-1] ^ 1]) if path in self.hub.corrupted else content


# A repository's name, and a revision: the client quotes the slashes of "refs/pr/1", which are unquoted here.
_R, _V = r"([^/]+/[^/]+?)", r"(refs/pr/\d+|[^/]+)"
_ROUTES = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), rf"/api/models/{_R}/branch/(.+)", _Handler.branch),
    (("POST",), rf"/api/models/{_R}/preupload/{_V}", _Handler.preupload),
    (("POST",), rf"/{_R}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/upload/(\w+)", _Handler.upload),
    (("POST",), rf"/api/models/{_R}/commit/{_V}", _Handler.commit),
    (("GET",), rf"/api/models/{_R}(?:/revision/{_V})?", lambda self, r, v: self.info(r, v or "main")),
    (("GET",), rf"/api/models/{_R}/tree/{_V}", _Handler.tree),
    (("GET", "HEAD"), rf"/{_R}/resolve/{_V}/(.+)", _Handler.resolve),
]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
