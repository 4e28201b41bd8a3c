# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""A small Hugging Face Hub on loopback: what `huggingface_hub` asks of it to create, fill, list and read model repos.

    with HubServer({"hf_alice": "alice"}) as hub:
        subprocess.run(..., env={**os.environ, **hub.environment("hf_alice")})

Written from the requests that the installed `huggingface_hub` (2.4) sends, with the status codes, error headers and
redirects that it tells apart. Large files go through LFS: `.safetensors` and whatever is not text. Not there: Xet
(switch it off with HF_HUB_DISABLE_XET=1), multipart uploads, pull requests, data sets and spaces.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


# Of the identifiers at https://huggingface.co/docs/hub/repositories-licenses, those that cards here may name.
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "other", "unknown"}
TIME = "2026-01-01T00:00:00.000Z"  # of everything that happens here


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git holds of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def git_oid(self) -> str:
        content = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def entry(self, path: str) -> dict:
        """As the listings of a repo describe it."""
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.git_oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        return entry


@dataclass
class Repo:
    name: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=lambda: {"branches": {}, "tags": {}})

    def __post_init__(self):
        self.owner = self.name.split("/")[0]
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, File], title: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {title} {self.name}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs["branches"][branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """Commit of a branch, a tag or a commit."""
        for refs in self.refs.values():
            if revision in refs:
                return refs[revision]
        return revision if revision in self.commits else None


class Answer(Exception):
    """Ends the handling of a request with a response."""

    def __init__(self, status: int, body: bytes | dict | list = b"", **headers: str):
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class HubServer(ThreadingHTTPServer):
    """
    Args:
        users: token -> name of its user, who may write repos named `name/...`.

    Attributes:
        repos: by their full name.
        requests: (method, path, whose token it carried) of all requests so far.
        cut: {repo: "lfs" or "commit"}: once the repo has a tag, drop the connection in the middle of an LFS upload, or
            on receipt of a commit before it is made.
    """

    daemon_threads = True

    def __init__(self, users: dict[str, str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, str] = {}
        self.lock = threading.RLock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        # Another origin for large files, as on the Hub: clients must not send their token there.
        self.storage_url = f"http://localhost:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()

    def environment(self, token: str | None = None) -> dict[str, str]:
        """Variables of a process that is to use this server, as the user of `token`."""
        environment = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return environment if token is None else {**environment, "HF_TOKEN": token}

    def handle_error(self, request, client_address):
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def answer(self):
        self.path = unquote(urlsplit(self.path).path)
        self.user = None
        try:
            self.body = b""
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            self.user = self.server.users.get(token)
            self.server.requests.append((self.command, self.path, self.user))
            if token and self.user is None:
                self.body = self.read_body()
                raise Answer(401, X_Error_Message="Invalid credentials in Authorization header")
            for method, pattern, handle in ROUTES:
                match = re.fullmatch(pattern, self.path)
                if match and self.command in method.split():
                    if handle is not Handler.put_object:
                        self.body = self.read_body()
                    handle(self, *match.groups())
            self.body = self.read_body() if not self.body else self.body
            raise Answer(404, {"error": f"No such route: {self.command} {self.path}"})
        except Answer as answer:
            self.respond(answer)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def respond(self, answer: Answer) -> None:
        body, kind = answer.body, "application/octet-stream"
        if not isinstance(body, bytes):
            body, kind = json.dumps(body).encode(), "application/json"
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError

    # --- who may do what --------------------------------------------------------------------------------------------

    def repo(self, name: str, write: bool = False) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and repo.owner != self.user):
            message = "Repository not found" if self.user else "Invalid username or password."
            raise Answer(404 if self.user else 401, X_Error_Code="RepoNotFound", X_Error_Message=message)
        if write and self.user is None:
            raise Answer(401, X_Error_Message="Invalid username or password.")
        if write and repo.owner != self.user:
            raise Answer(403, X_Error_Message="You don't have the required permissions")
        return repo

    def commit(self, repo: Repo, revision: str) -> str:
        oid = repo.resolve(revision)
        if oid is None:
            message = f"Invalid rev id: {revision}"
            raise Answer(404, {"error": message}, X_Error_Code="RevisionNotFound", X_Error_Message=message)
        return oid

    # --- users, repos, revisions ------------------------------------------------------------------------------------

    def whoami(self):
        if self.user is None:
            raise Answer(401, {"error": "Invalid username or password."})
        raise Answer(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self):
        if self.user is None:
            raise Answer(401, X_Error_Message="Invalid username or password.")
        fields = json.loads(self.body)
        owner = fields.get("organization") or self.user
        name = f"{owner}/{fields['name']}"
        if owner != self.user:
            raise Answer(403, X_Error_Message=f'You don\'t have the rights to create a model under "{owner}"')
        with self.server.lock:
            existed = name in self.server.repos
            if not existed:
                self.server.repos[name] = Repo(name, fields.get("visibility") == "private")
        body = {"url": f"{self.server.url}/{name}", "name": name, "private": self.server.repos[name].private}
        if existed:
            raise Answer(409, {"error": "You already created this model repo", **body})
        raise Answer(200, body)

    def model_info(self, name, revision=None):
        repo = self.repo(name)
        oid = self.commit(repo, revision or "main")
        files = repo.commits[oid]
        info = {
            **{"id": name, "modelId": name, "author": repo.owner, "sha": oid, "private": repo.private},
            **{"lastModified": TIME, "gated": False, "disabled": False, "tags": []},
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }
        if "README.md" in files:
            info["cardData"] = front_matter(files["README.md"].content.decode())
            info["pipeline_tag"] = info["cardData"].get("pipeline_tag")
        raise Answer(200, info)

    def refs(self, name):
        refs = self.repo(name).refs
        body = {
            kind: [{"name": ref, "ref": f"refs/{git}/{ref}", "targetCommit": oid} for ref, oid in refs[kind].items()]
            for kind, git in (("branches", "heads"), ("tags", "tags"))
        }
        raise Answer(200, {**body, "converts": []})

    def commits(self, name, revision):
        repo = self.repo(name)
        self.commit(repo, revision)
        body = [{"id": oid, "title": "", "message": "", "authors": [], "date": TIME} for oid in reversed(repo.commits)]
        raise Answer(200, body)

    def tree(self, name, revision, folder=""):
        repo = self.repo(name)
        files = repo.commits[self.commit(repo, revision)]
        raise Answer(200, [file.entry(path) for path, file in sorted(files.items()) if path.startswith(folder or "")])

    def create_branch(self, name, branch):
        repo = self.repo(name, write=True)
        if branch in repo.refs["branches"]:
            raise Answer(409, {"error": "Reference already exists"})
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repo.refs["branches"][branch] = self.commit(repo, start)
        raise Answer(200, {})

    def create_tag(self, name, revision):
        repo = self.repo(name, write=True)
        repo.refs["tags"][json.loads(self.body)["tag"]] = self.commit(repo, revision)
        raise Answer(200, {})

    # --- upload -----------------------------------------------------------------------------------------------------

    def validate_yaml(self):
        problems = card_problems(json.loads(self.body)["content"])
        raise Answer(400 if problems else 200, {"errors": [{"message": text} for text in problems], "warnings": []})

    def preupload(self, name, revision):
        repo = self.repo(name, write=True)
        present = repo.commits[self.commit(repo, revision)]
        files = []
        for file in json.loads(self.body)["files"]:
            text = not file["path"].endswith(".safetensors") and b"\0" not in base64.b64decode(file["sample"])
            oid = present[file["path"]].etag if file["path"] in present else None
            mode = "regular" if text else "lfs"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer(200, {"files": files})

    def lfs_batch(self, name):
        self.repo(name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.server.storage_url}/upload/{name}/{wanted['oid']}"},
                    "verify": {"href": f"{self.server.url}/verify/{name}"},
                }
            objects.append(answer)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def put_object(self, name, oid):
        if self.server.cut.get(name) == "lfs" and self.server.repos[name].refs["tags"]:
            self.rfile.read(100)
            self.hang_up()
        content = self.read_body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Answer(400, {"error": "The content does not match its hash"})
        self.server.objects[oid] = content
        raise Answer(200)

    def verify(self, name):
        self.repo(name, write=True)
        wanted = json.loads(self.body)
        raise Answer(200 if len(self.server.objects.get(wanted["oid"], b"")) == wanted["size"] else 404)

    def make_commit(self, name, revision):
        repo = self.repo(name, write=True)
        if self.server.cut.get(name) == "commit" and repo.refs["tags"]:
            self.hang_up()
        if revision not in repo.refs["branches"]:
            raise Answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        with self.server.lock:
            files, title = dict(repo.commits[repo.refs["branches"][revision]]), ""
            for line in self.body.splitlines():
                key, value = (json.loads(line)[name] for name in ("key", "value"))
                if key == "header":
                    title = value["summary"]
                    if value.get("parentCommit", repo.refs["branches"][revision]) != repo.refs["branches"][revision]:
                        raise Answer(412, {"error": "The expected parent commit is not the branch's head"})
                elif key == "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
                elif key == "lfsFile":
                    if value["oid"] not in self.server.objects:
                        raise Answer(400, {"error": f"LFS pointer pointed to a file that does not exist: {value}"})
                    files[value["path"]] = File(self.server.objects[value["oid"]], lfs=True)
                elif key == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        message = "A file with this name doesn't exist"
                        raise Answer(404, {"error": message}, X_Error_Code="EntryNotFound", X_Error_Message=message)
                else:
                    raise Answer(400, {"error": f"Operation {key!r} is not supported here"})
            oid = repo.commit(revision, files, title)
        raise Answer(200, {"success": True, "commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    # --- download ---------------------------------------------------------------------------------------------------

    def resolve(self, name, revision, path):
        repo = self.repo(name)
        oid = self.commit(repo, revision)
        file = repo.commits[oid].get(path)
        if file is None:
            raise Answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=oid)
        headers = {"X_Repo_Commit": oid, "Accept_Ranges": "bytes"}
        if not file.lfs:
            self.send_content(file.content, ETag=f'"{file.git_oid}"', **headers)
        raise Answer(
            302,
            **{"Location": f"{self.server.storage_url}/objects/{file.sha256}", **headers},
            **{"X_Linked_ETag": f'"{file.sha256}"', "X_Linked_Size": str(file.size)},
        )

    def get_object(self, oid):
        if self.headers.get("Authorization"):
            raise Answer(400, {"error": "A token was sent to the storage of large files"})
        self.send_content(self.server.objects[oid], ETag=f'"{oid}"')

    def send_content(self, content: bytes, **headers: str):
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            raise Answer(206, content[start:], Content_Range=span, **headers)
        raise Answer(200, content, **headers)


NAME, REVISION = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"/api/models/{NAME}", Handler.model_info),
    ("GET", f"/api/models/{NAME}/revision/{REVISION}", Handler.model_info),
    ("GET", f"/api/models/{NAME}/refs", Handler.refs),
    ("GET", f"/api/models/{NAME}/commits/{REVISION}", Handler.commits),
    ("GET", f"/api/models/{NAME}/tree/{REVISION}(?:/(.*))?", Handler.tree),
    ("POST", f"/api/models/{NAME}/branch/{REVISION}", Handler.create_branch),
    ("POST", f"/api/models/{NAME}/tag/{REVISION}", Handler.create_tag),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", Handler.make_commit),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", f"/verify/{NAME}", Handler.verify),
    ("PUT", f"/upload/{NAME}/([0-9a-f]{{64}})", Handler.put_object),
    ("GET HEAD", "/objects/([0-9a-f]{64})", Handler.get_object),
    ("GET HEAD", f"/{NAME}/resolve/{REVISION}/(.+)", Handler.resolve),
]


def front_matter(card: str) -> dict:
    """The metadata of a model card; empty where there are none."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, flags=re.DOTALL)
    return yaml.safe_load(match[1]) or {} if match else {}


def card_problems(card: str) -> list[str]:
    """What the Hub would refuse in a card's metadata, by its documentation (docs/hub/model-cards, modelcard.md).

    The Hub's own check is not public; this one knows the types of the fields that cards here use.
    """
    try:
        data = front_matter(card)
    except yaml.YAMLError as error:
        return [f"YAML cannot be parsed: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    problems = []
    for name in ("license", "library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            problems.append(f'"{name}" must be a string')
    if data.get("license", "mit") not in LICENSES:
        problems.append(f'"license" must be one of {sorted(LICENSES)}')
    for name in ("tags", "metrics", "datasets", "language", "base_model"):
        value = data.get(name, [])
        if not isinstance(value, (str, list)) or not all(isinstance(entry, str) for entry in value):
            problems.append(f'"{name}" must be a string or an array of strings')
    for index, entry in enumerate(data.get("model-index", [])):
        where = f'"model-index[{index}]'
        if not isinstance(entry.get("name"), str):
            problems.append(f'{where}.name" is required')
        for number, result in enumerate(entry.get("results", [])):
            place = f"{where}.results[{number}]"
            for field_name in ("task.type", "dataset.type", "dataset.name"):
                group, key = field_name.split(".")
                if not isinstance(result.get(group, {}).get(key), str):
                    problems.append(f'{place}.{field_name}" is required')
            metrics = result.get("metrics") or []
            if not metrics or not all(isinstance(m.get("type"), str) and "value" in m for m in metrics):
                problems.append(f'{place}.metrics" must name a type and a value each')
    return problems
