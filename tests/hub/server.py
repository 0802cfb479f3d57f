"""A small model hub on loopback: what huggingface_hub asks of one when models are pushed and pulled.

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
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]


class Hub:
    """The server. Use as a context manager; `url` is its address.

    Attributes:
        repositories: By id.
        requests: How often each kind of request came, as "POST commit".
        uploads: SHA-256 of every object that arrived completely, in order.
        failing_upload: From which upload on (counted from 1) connections are cut in the middle; None for never.
        corrupted: Paths whose contents are served with a flipped bit.
        messages: Of the commits, in order.
        refused_yaml: What `validate-yaml` answers with an error, if not empty.
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
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False, branch: str = "main") -> str:
        """Put a repository, or a commit to it, there without a push."""
        repository = self.repositories.setdefault(repo_id, Repository(private))
        return repository.commit(branch, files)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    # Answers ---------------------------------------------------------------------------------------------------------

    def answer(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str | None = None, message: str = "") -> None:
        headers = {"X_Error_Code": code} if code else {}
        self.answer(status, {"error": message}, **headers, **({"X_Error_Message": message} if message else {}))

    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def may_write(self, repo_id: str | None = None) -> bool:
        """Or an error was answered. A pull request may be opened where one may not write."""
        token = self.token()
        own = repo_id is None or repo_id.startswith(f"{USER}/") or self.query.get("create_pr") == ["1"]
        if token == GOOD_TOKEN and own:
            return True
        if token in (GOOD_TOKEN, READ_ONLY_TOKEN):
            self.error(403, message="this token may not write")
        elif token is None:
            self.error(401, message="Invalid username or password.")
        else:
            self.error(401, message="Invalid credentials in Authorization header")
        return False

    def repository(self, repo_id: str) -> Repository | None:
        """The repository, or None after an error was answered."""
        if self.token() not in (None, GOOD_TOKEN, READ_ONLY_TOKEN):
            self.error(401, message="Invalid credentials in Authorization header")
            return None
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.private and self.token() is None):
            status = 401 if self.token() is None else 404
            self.error(status, "RepoNotFound", "Repository not found")
            return None
        return found

    # Requests --------------------------------------------------------------------------------------------------------

    def do_GET(self):
        self.route()

    do_HEAD = do_POST = do_PUT = do_GET

    def route(self):
        self.path_only = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        for method, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, self.path_only)
            if match and self.command in method:
                with self.hub.lock:
                    self.hub.requests[f"{self.command} {function.__name__}"] += 1
                if self.command == "PUT":
                    function(self, *match.groups())
                    return
                self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                function(self, *match.groups())
                return
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.error(404, message=f"the test hub knows no {self.command} {self.path_only}")

    def whoami(self):
        if self.may_write():
            self.answer(200, {"name": USER, "type": "user"})

    def create(self):
        payload = json.loads(self.body)
        repo_id = f"{payload.get('organization') or USER}/{payload['name']}"
        if not self.may_write(repo_id):
            return
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repositories:
            self.answer(409, url | {"error": "You already created this model repo"})
            return
        private = payload.get("visibility") == "private" or bool(payload.get("private"))
        self.hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private)
        self.answer(200, url)

    def validate_yaml(self):
        if self.hub.refused_yaml:
            errors = [{"message": self.hub.refused_yaml}]
            self.answer(400, {"errors": errors, "warnings": [], "error": self.hub.refused_yaml})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def branch(self, repo_id, name):
        repository = self.repository(repo_id) if self.may_write(repo_id) else None
        if repository is None:
            return
        if name in repository.branches:
            self.error(409, message="Reference already exists")
            return
        repository.branches[name] = repository.branches["main"]
        self.answer(200, {})

    def preupload(self, repo_id, revision):
        repository = self.repository(repo_id) if self.may_write(repo_id) else None
        if repository is None:
            return
        there = repository.commits.get(repository.find(revision) or "", {})
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            entry = {
                "path": path,
                "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            if path in there:
                entry["oid"] = _sha256(there[path]) if path.endswith(LFS_SUFFIXES) else _git_sha(there[path])
            files.append(entry)
        self.answer(200, {"files": files})

    def batch(self, repo_id):
        if not self.may_write():
            return
        objects = []
        for entry in json.loads(self.body)["objects"]:
            known = entry["oid"] in self.hub.objects
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/upload/{entry['oid']}"}}}
            objects.append({"oid": entry["oid"], "size": entry["size"], **({} if known else upload)})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid):
        with self.hub.lock:
            self.hub.started_uploads += 1
            cut = self.hub.failing_upload is not None and self.hub.started_uploads >= self.hub.failing_upload
        length = int(self.headers["Content-Length"])
        content = self.rfile.read(length // 2 if cut else length)
        if cut:
            self.close_connection = True
            self.connection.close()
            return
        assert _sha256(content) == oid
        with self.hub.lock:
            self.hub.objects[oid] = content
            self.hub.uploads.append(oid)
        self.answer(200)

    def commit(self, repo_id, revision):
        repository = self.repository(repo_id) if self.may_write(repo_id) else None
        if repository is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repository.commits[repository.find(revision)])
        for line in lines:
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
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha, **answer})

    def info(self, repo_id, revision=None):
        repository = self.repository(repo_id)
        if repository is None:
            return
        sha = repository.find(revision or "main")
        if sha is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        self.answer(200, {"id": repo_id, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, repo_id, revision):
        repository = self.repository(repo_id)
        if repository is None:
            return
        sha = repository.find(revision)
        if sha is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        entries = []
        for path, content in sorted(repository.commits[sha].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git_sha(content)}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.answer(200, entries)

    def resolve(self, repo_id, revision, path):
        repository = self.repository(repo_id)
        if repository is None:
            return
        sha = repository.find(revision)
        if sha is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        content = repository.commits[sha].get(path)
        if content is None:
            self.error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X_Repo_Commit": sha, "ETag": f'"{_git_sha(content)}"'}
        if path.endswith(LFS_SUFFIXES):
            headers |= {"X_Linked_Etag": f'"{_sha256(content)}"', "X_Linked_Size": str(len(content))}
        if path in self.hub.corrupted:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.answer(200, content, **headers)


# A repository's name, and a revision: the client quotes the slashes of "refs/pr/1", `route` has unquoted them.
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
    (("GET",), rf"/api/models/{_R}", _Handler.info),
    (("GET",), rf"/api/models/{_R}/revision/{_V}", _Handler.info),
    (("GET",), rf"/api/models/{_R}/tree/{_V}", _Handler.tree),
    (("GET", "HEAD"), rf"/{_R}/resolve/{_V}/(.+)", _Handler.resolve),
]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
