"""The Hub's HTTP protocol on loopback, as far as pushing and loading a SAE speaks it.

Written after what `huggingface_hub` sends and reads: commits are all or nothing, safetensors go
through LFS and are served from another host, errors carry the Hub's `X-Error-Code`.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, READ_TOKEN = "hf_writer", "hf_reader"


class File(NamedTuple):
    content: bytes
    lfs: bool

    @property
    def oid(self):
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class Repo:
    def __init__(self, private):
        self.private = private
        self.commits = {}
        self.branches = {}
        self.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})

    def commit(self, branch, files):
        state = repr((len(self.commits), sorted((n, f.oid) for n, f in files.items())))
        sha = hashlib.sha1(state.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, branch="main"):
        return self.commits[self.branches[branch]]

    def resolve(self, revision):
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


class Hub(ThreadingHTTPServer):
    """Repos in memory, and faults to order: `cut[path]` is after how many bytes the connection of
    a transfer breaks, `cuts` how often it still does."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {}
        self.lfs = {}
        self.cut = {}
        self.cuts = 0
        self.requests = []
        self.listed = []  # names that a listing has beside the real ones
        self.before_commit = None
        self.ranges = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def cdn(self):
        return f"http://localhost:{self.server_port}/cdn"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        """Connections that break are ordered."""

    def breaks(self, name):
        """After how many bytes this transfer is to break, None for not at all."""
        if name not in self.cut or self.cuts == 0:
            return None
        self.cuts -= 1
        return self.cut[name]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.route()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def route(self):
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.requests.append((self.command, path, token))
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                if not path.startswith(("/cdn/", "/lfs/")):
                    if token not in ("", TOKEN, READ_TOKEN):
                        message = "Invalid credentials in Authorization header"
                        return self.fail(401, message=message)
                    if self.command == "POST" and not self.may_write(token, path):
                        return None
                return action(self, *match.groups())
        return self.fail(404)

    def may_write(self, token, path):
        if path == "/api/validate-yaml" or token == TOKEN:
            return True
        self.read_body()
        if token == "":
            self.fail(401, message="Invalid username or password.")
        else:
            self.fail(403, message="You need a token with the write role")
        return False

    # --- requests --------------------------------------------------------------------------------

    def create(self):
        wanted = json.loads(self.read_body())
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "me":
            return self.fail(403, message=f"You have no rights in {wanted['organization']}")
        if name in self.server.repos:
            return self.answer({"error": "You already created this", "url": ""}, 409)
        self.server.repos[name] = Repo(wanted.get("visibility") == "private")
        return self.answer({"url": f"{self.server.url}/{name}", "name": name})

    def info(self, name, revision=None):
        repo = self.repo(name)
        sha = repo and self.commit_of(repo, revision or "main")
        if not sha:
            return
        names = [*repo.commits[sha], *self.server.listed]
        self.answer(
            {
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": repo.private,
                "tags": [],
                "siblings": [{"rfilename": n} for n in names],
            }
        )

    def tree(self, name, revision):
        repo = self.repo(name)
        sha = repo and self.commit_of(repo, revision)
        if not sha:
            return
        listed = []
        for path, file in repo.commits[sha].items():
            size = len(file.content)
            lfs = {"lfs": {"oid": file.oid, "size": size, "pointerSize": 134}} if file.lfs else {}
            listed.append({"type": "file", "path": path, "oid": file.oid, "size": size, **lfs})
        self.answer(listed)

    def validate(self):
        card = json.loads(self.read_body())["content"]
        head = yaml.safe_load(card.split("---")[1])
        bad = [] if isinstance(head, dict) else [{"message": "no metadata"}]
        self.answer({"errors": bad, "warnings": []}, 400 if bad else 200)

    def preupload(self, name, revision):
        wanted = json.loads(self.read_body())["files"]
        repo = self.repo(name)
        sha = repo and self.commit_of(repo, revision)
        if not sha:
            return
        there = repo.commits[sha]
        self.answer(
            {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        **({"oid": there[f["path"]].oid} if f["path"] in there else {}),
                    }
                    for f in wanted
                ]
            }
        )

    def batch(self, name):
        wanted = json.loads(self.read_body())
        assert wanted["operation"] == "upload"
        assert "basic" in wanted["transfers"]
        objects = []
        for item in wanted["objects"]:
            if item["oid"] not in self.server.lfs:
                href = f"{self.server.url}/lfs/{item['oid']}"
                verify = f"{self.server.url}/{name}.git/info/lfs/verify"
                item = {**item, "actions": {"upload": {"href": href}, "verify": {"href": verify}}}
            objects.append(item)
        self.answer({"transfer": "basic", "objects": objects})

    def verify(self, _name):
        wanted = json.loads(self.read_body())
        stored = self.server.lfs.get(wanted["oid"])
        self.answer({}, 200 if stored is not None and len(stored) == wanted["size"] else 404)

    def put(self, oid):
        at = self.server.breaks("upload")
        if at is not None:
            self.rfile.read(at)
            return self.hang_up()
        content = self.read_body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.fail(400)
        self.server.lfs[oid] = content
        return self.answer(None)

    def commit(self, name, branch):
        lines = [json.loads(line) for line in self.read_body().splitlines()]
        repo = self.repo(name)
        if repo is None:
            return None
        if self.server.before_commit:
            self.server.before_commit(repo)
        header, *operations = lines
        if header["value"]["parentCommit"] != repo.branches[branch]:
            return self.fail(412, message="A commit has happened since. Please refresh.")
        files = dict(repo.files(branch))
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.lfs:
                    return self.fail(400, message="a file is missing from LFS")
                files[value["path"]] = File(self.server.lfs[value["oid"]], True)
            else:
                assert operation["key"] == "deletedFile"
                del files[value["path"]]
        sha = repo.commit(branch, files)
        url = f"{self.server.url}/{name}/commit/{sha}"
        return self.answer({"success": True, "commitOid": sha, "commitUrl": url})

    def file(self, name, revision, path):
        repo = self.repo(name)
        sha = repo and self.commit_of(repo, revision)
        if not sha:
            return None
        file = repo.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if file is None:
            return self.fail(404, "EntryNotFound", headers=headers)
        headers["ETag"] = f'"{file.oid}"'
        if not file.lfs:
            return self.send_content(path, file.content, headers)
        self.server.lfs[file.oid] = file.content
        location = f"{self.server.cdn}/{file.oid}/{path}"
        headers |= {"X-Linked-Size": str(len(file.content)), "X-Linked-Etag": f'"{file.oid}"'}
        return self.answer(None, 302, {**headers, "Location": location})

    def stored(self, oid, path):
        self.send_content(path, self.server.lfs[oid], {})

    # --- answers ---------------------------------------------------------------------------------

    def repo(self, name):
        repo = self.server.repos.get(name)
        anonymous = not self.headers.get("Authorization")
        if repo is None or (repo.private and anonymous):
            self.fail(401 if anonymous else 404, "RepoNotFound", "Repository not found")
            return None
        return repo

    def commit_of(self, repo, revision):
        sha = repo.resolve(revision)
        if sha is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def send_content(self, path, content, headers):
        status, start = 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and self.server.ranges:
            status, start = 206, int(wanted[1])
            end = f"{len(content) - 1}/{len(content)}"
            headers = {**headers, "Content-Range": f"bytes {start}-{end}"}
        content = content[start:]
        at = self.server.breaks(path) if self.command == "GET" else None
        self.head(status, {**headers, "Content-Length": str(len(content))})
        if self.command == "GET":
            self.wfile.write(content[:at])
        if at is not None:
            self.hang_up()

    def answer(self, content, status=200, headers=None):
        body = b"" if content is None else json.dumps(content).encode()
        self.head(status, {**(headers or {}), "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status, code="", message="", headers=None):
        errors = {"X-Error-Code": code, "X-Error-Message": message}
        named = {name: value for name, value in errors.items() if value}
        self.answer({"error": message}, status, {**(headers or {}), **named})

    def head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def hang_up(self):
        self.wfile.flush()
        self.close_connection = True


NAME, REST = r"([^/]+/[^/]+)", "(.+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/{REST}", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    ("POST", f"/api/models/{NAME}/preupload/{REST}", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/{REST}", Handler.commit),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", f"/{NAME}\\.git/info/lfs/verify", Handler.verify),
    ("PUT", "/lfs/([0-9a-f]{64})", Handler.put),
    ("GET", "/cdn/([0-9a-f]{64})/(.+)", Handler.stored),
    (("GET", "HEAD"), f"/{NAME}/resolve/([^/]+)/{REST}", Handler.file),
]
