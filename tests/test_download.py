"""data/download.py against a small server on loopback that speaks what huggingface_hub asks for."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "download.py"
sys.path.insert(0, str(SCRIPT.parent))

download = importlib.import_module("download")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPECS = json.loads((ROOT / "data" / "specs.json").read_text(encoding="utf-8"))


def make_shard(tokens, seed=0):
    header = np.zeros(256, "<i4")
    header[:3] = download.MAGIC, download.VERSION, tokens
    body = np.random.default_rng(seed).integers(0, 1024, tokens, dtype=np.uint16)
    return header.tobytes() + body.astype("<u2").tobytes()


def make_repo(variant="sp1024", train=3, seed=0):
    """Files of a repository laid out like the published one: {path: bytes}."""
    spec = SPECS[variant]
    folder = f"datasets/datasets/{spec['folder']}"
    files = {f"{folder}/fineweb_val_000000.bin": make_shard(700, seed + 100)}
    if spec["byte_sidecar"]:
        files[f"{folder}/fineweb_val_bytes_000000.bin"] = make_shard(700, seed + 200)
    for index in range(train):
        files[f"{folder}/fineweb_train_{index:06d}.bin"] = make_shard(900, seed + index)
    files[f"datasets/tokenizers/{spec['tokenizer']}"] = b"a tokenizer " + bytes([seed]) * 50
    files["datasets/manifest.json"] = b"{}"
    return files


class Handler(BaseHTTPRequestHandler):
    """One request to the fake hub; the state is on the server object."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Keep the log of the test run quiet."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        for repo, files in self.server.repos.items():
            if path == f"/api/datasets/{repo}":
                return self.send_json({"id": repo, "sha": COMMIT, "siblings": []})
            if path.startswith(f"/api/datasets/{repo}/tree/{COMMIT}/"):
                return self.send_tree(files, path.partition(f"/tree/{COMMIT}/")[2])
            if path.startswith(f"/datasets/{repo}/resolve/{COMMIT}/"):
                return self.send_file(files, path.partition(f"/resolve/{COMMIT}/")[2])
        return self.send_error_code("RepoNotFound")

    def send_error_code(self, code):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_tree(self, files, folder):
        entries = []
        for path, data in files.items():
            if path.rpartition("/")[0] != folder:
                continue
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
            if path.endswith(".bin"):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"size": len(data), "oid": sha256, "pointerSize": 130}
            entries.append(entry)
        if not entries:
            return self.send_error_code("EntryNotFound")
        return self.send_json([{"type": "directory", "path": f"{folder}/sub", "oid": COMMIT}, *entries])

    def send_file(self, files, path):
        if path not in files:
            return self.send_error_code("EntryNotFound")
        data = self.server.served.get(path, files[path])
        start = 0
        if self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "GET":
            self.send_body(path, data[start:])
        return None

    def send_body(self, path, data):
        if path not in self.server.cut:
            self.wfile.write(data)
            return
        self.server.cut.discard(path)
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.server.half_sent.set()
        self.server.go_on.wait(30)
        self.close_connection = True


@pytest.fixture
def hub():
    """The server: `repos` {name: files}, `served` sent instead of what is listed, `cut` broken off once."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repos = {SPECS["sp1024"]["repo"]: make_repo()}
    server.served, server.cut, server.requests = {}, set(), []
    server.half_sent, server.go_on = threading.Event(), threading.Event()
    server.go_on.set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(hub, tmp_path, *arguments, endpoint=None, **environment):
    """Run the script to its end as a user would."""
    process = start(hub, tmp_path, *arguments, endpoint=endpoint, **environment)
    with process:
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def start(hub, tmp_path, *arguments, endpoint=None, **environment):
    """Start the script; huggingface_hub reads HF_ENDPOINT when it is imported, hence a process of its own."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LANG") if name in os.environ}
    settings = {
        "HF_ENDPOINT": endpoint or f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=tmp_path,
        env={**kept, **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_one_line(result, *parts):
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("download.py: "), result.stderr
    for part in parts:
        assert part in result.stderr


def sent(hub):
    """Names of the files whose content was asked for."""
    return [
        path.rpartition("/")[2]
        for command, path, _ in hub.requests
        if command == "GET" and "/resolve/" in path
    ]


def local_files(out):
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def shard_path(out, name, variant="sp1024"):
    return out / "datasets" / SPECS[variant]["folder"] / name


def test_download_then_keep_then_more(hub, tmp_path):
    out = tmp_path / "data"
    result = fetch(hub, tmp_path, "sp1024", "--train-shards", "2")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    folder = f"datasets/{SPECS['sp1024']['folder']}"
    shards = [f"{folder}/fineweb_{name}.bin" for name in ("train_000000", "train_000001", "val_000000")]
    assert local_files(out) == {*shards, "tokenizers/fineweb_1024_bpe.model"}
    files = hub.repos[SPECS["sp1024"]["repo"]]
    for shard in shards:
        assert (out / shard).read_bytes() == files[f"datasets/{shard}"]
    assert "DATA_PATH=data/datasets/fineweb10B_sp1024 " in result.stdout
    assert "TOKENIZER_PATH=data/tokenizers/fineweb_1024_bpe.model VOCAB_SIZE=1024" in result.stdout
    assert "1,800 train and 700 validation tokens" in result.stdout
    assert "62,021,632 validation tokens" in result.stdout

    hub.requests.clear()
    result = fetch(hub, tmp_path, "sp1024", "--train-shards", "2")
    assert result.returncode == 0 and "4 file(s) kept, 0 to fetch" in result.stdout
    assert sent(hub) == []

    # The default is 80 shards, or all there are.
    result = fetch(hub, tmp_path, "sp1024")
    assert result.returncode == 0, result.stderr
    assert sent(hub) == ["fineweb_train_000002.bin"]


def test_broken_connection_resumes_where_it_stopped(hub, tmp_path):
    files = hub.repos[SPECS["sp1024"]["repo"]]
    path = next(path for path in files if path.endswith("train_000000.bin"))
    # The hub's library stores pieces of 10 MiB, so a smaller file would start again from its first byte.
    files[path] = make_shard(15 << 20)
    hub.cut.add(path)
    result = fetch(hub, tmp_path, "sp1024", "--train-shards", "1")
    assert result.returncode == 0, result.stderr
    ranges = [asked for _, name, asked in hub.requests if name.endswith("train_000000.bin") and asked]
    assert ranges == [f"bytes={10 << 20}-"]
    assert shard_path(tmp_path / "data", "fineweb_train_000000.bin").read_bytes() == files[path]


def test_killed_download_leaves_nothing_half_done(hub, tmp_path):
    out = tmp_path / "data"
    files = hub.repos[SPECS["sp1024"]["repo"]]
    hub.cut.add(next(path for path in files if path.endswith("train_000000.bin")))
    hub.go_on.clear()
    with start(hub, tmp_path, "sp1024", "--train-shards", "1") as process:
        assert hub.half_sent.wait(30)
        process.kill()
        process.communicate(timeout=30)
    hub.go_on.set()
    assert not shard_path(out, "fineweb_train_000000.bin").exists()
    hub.requests.clear()
    result = fetch(hub, tmp_path, "sp1024", "--train-shards", "1")
    assert result.returncode == 0, result.stderr
    assert sent(hub) == ["fineweb_train_000000.bin"]
    assert {path.name for path in out.iterdir()} == {"datasets", "tokenizers"}
    assert len(local_files(out)) == 3


@pytest.mark.parametrize("damage", ["cut", "magic", "other size", "content"])
def test_bad_files_already_there(hub, tmp_path, damage):
    out = tmp_path / "data"
    assert fetch(hub, tmp_path, "sp1024", "--train-shards", "1").returncode == 0
    shard = shard_path(out, "fineweb_train_000000.bin")
    good = shard.read_bytes()
    bad = {
        "cut": good[:-100],
        "magic": b"\0\0\0\0" + good[4:],
        "other size": make_shard(800),
        "content": good[:-2] + b"\7\7",
    }[damage]
    shard.write_bytes(bad)
    hub.requests.clear()
    result = fetch(hub, tmp_path, "sp1024", "--train-shards", "1")
    assert result.returncode == 0, result.stderr
    if damage == "content":
        assert shard.read_bytes() == bad and sent(hub) == []
        result = fetch(hub, tmp_path, "sp1024", "--train-shards", "1", "--verify")
        assert result.returncode == 0, result.stderr
    assert "fineweb_train_000000.bin, 0.0 MB (what is there is bad)" in result.stdout
    assert shard.read_bytes() == good
    assert sent(hub) == ["fineweb_train_000000.bin"]


def test_shards_published_bad_are_refused(hub, tmp_path):
    files = hub.repos[SPECS["sp1024"]["repo"]]
    path = next(path for path in files if path.endswith("train_000001.bin"))
    good = files[path]
    for bad, reason in (
        (b"\1" + good[1:], "magic"),
        (good[:4] + b"\2" + good[5:], "version 2"),
        (good[:-2], "asks for 2824"),
        (good[:700], "header"),
    ):
        files[path] = bad
        result = fetch(hub, tmp_path, "sp1024", "--train-shards", "2")
        assert_one_line(result, "fineweb_train_000001.bin came bad and was removed", reason)
        assert not shard_path(tmp_path / "data", "fineweb_train_000001.bin").exists()
    files[path] = good
    hub.requests.clear()
    assert fetch(hub, tmp_path, "sp1024", "--train-shards", "2").returncode == 0
    assert sent(hub) == ["fineweb_train_000001.bin"]


def test_content_other_than_listed_is_refused(hub, tmp_path):
    files = hub.repos[SPECS["sp1024"]["repo"]]
    path = next(path for path in files if path.endswith("val_000000.bin"))
    hub.served[path] = files[path][:-2] + b"\7\7"
    result = fetch(hub, tmp_path, "sp1024", "--train-shards", "1")
    assert_one_line(result, "fineweb_val_000000.bin came bad and was removed: hash ")
    assert local_files(tmp_path / "data" / "datasets") == set()


def test_caseops_brings_byte_sidecars(hub, tmp_path):
    repo = SPECS["caseops"]["repo"]
    hub.repos[repo] = make_repo("caseops")
    result = fetch(hub, tmp_path, "caseops", "--train-shards", "0", "--out", "my data")
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (tmp_path / "my data").rglob("*.bin")}
    assert names == {"fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"}
    assert "DATA_PATH='my data/datasets/" in result.stdout
    assert "0 train and 700 validation tokens" in result.stdout
    hub.repos[repo] = {path: data for path, data in hub.repos[repo].items() if "val_bytes" not in path}
    assert_one_line(fetch(hub, tmp_path, "caseops", "--out", "new"), "0 fineweb_val_bytes_* for 1 validation")


def test_another_repository_leaves_other_variants_alone(hub, tmp_path):
    hub.repos[SPECS["sp8192"]["repo"]] = make_repo("sp8192", seed=20)
    hub.repos["someone/else"] = make_repo("sp1024", train=1, seed=40)
    moved = {path.removeprefix("datasets/"): data for path, data in hub.repos["someone/else"].items()}
    hub.repos["someone/flat"] = moved
    out = tmp_path / "data"
    assert fetch(hub, tmp_path, "sp8192", "--train-shards", "1").returncode == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    hub.requests.clear()
    environment = {"MATCHED_FINEWEB_REPO_ID": "someone/flat", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": ""}
    result = fetch(hub, tmp_path, "sp1024", "--train-shards", "1", **environment)
    assert result.returncode == 0, result.stderr
    assert all("someone/flat" in path for _, path, _ in hub.requests)
    assert {path: path.read_bytes() for path in before} == before
    hub.requests.clear()
    assert fetch(hub, tmp_path, "sp8192", "--train-shards", "1").returncode == 0
    assert sent(hub) == []
    # Shards alike in size are told apart by --verify, tokenizers always.
    result = fetch(hub, tmp_path, "sp1024", "--train-shards", "1", "--verify")
    assert result.returncode == 0 and len(sent(hub)) == 3


def test_bad_arguments(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = {
        ("sp1042",): "allowed: sp1024, sp8192, caseops; did you mean sp1024",
        ("case",): "did you mean caseops?",
        ("zzz",): "variant 'zzz' is unknown",
        (): "required: variant",
        ("sp1024", "--train-shards", "-1"): "--train-shards",
        ("sp1024", "--train-shards", "many"): "'many' is not allowed; allowed: a whole number",
        ("sp1024", "--shards", "1"): "--shards",
    }
    for arguments, part in cases.items():
        assert download.main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and part in error
    assert list(tmp_path.iterdir()) == []


def test_what_the_hub_lacks(hub, tmp_path):
    run = [hub, tmp_path, "sp1024"]
    result = fetch(*run, MATCHED_FINEWEB_REPO_ID="no/such")
    assert_one_line(result, "no/such: no such dataset on http://127.0.0.1", "MATCHED_FINEWEB_REPO_ID")
    result = fetch(*run, MATCHED_FINEWEB_REPO_ID="not a name")
    assert_one_line(result, "not a name")
    result = fetch(*run, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX="elsewhere")
    assert_one_line(result, "found no folder elsewhere/datasets/fineweb10B_sp1024")
    result = fetch(*run, "--train-shards", "4")
    assert_one_line(result, "--train-shards 4", "has 3 of fineweb10B_sp1024; allowed: 0..3")
    files = hub.repos[SPECS["sp1024"]["repo"]]
    del files["datasets/tokenizers/fineweb_1024_bpe.model"]
    files["datasets/tokenizers/another.model"] = b"x"
    assert_one_line(fetch(*run), "found no datasets/tokenizers/fineweb_1024_bpe.model")
    del files["datasets/datasets/fineweb10B_sp1024/fineweb_val_000000.bin"]
    assert_one_line(fetch(*run), "found no fineweb_val_000000.bin in fineweb10B_sp1024")
    assert not (tmp_path / "data").exists()


def test_no_network(hub, tmp_path):
    result = fetch(hub, tmp_path, "sp1024", endpoint="http://127.0.0.1:9")
    assert_one_line(result, "cannot get the repository from http://127.0.0.1:9", "run the same command again")
    assert not (tmp_path / "data").exists()


def test_library_missing(hub, tmp_path):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "huggingface_hub.py").write_text("raise ImportError\n", encoding="utf-8")
    result = fetch(hub, tmp_path, "sp1024", PYTHONPATH=str(tmp_path / "stub"))
    assert_one_line(result, "pip install huggingface_hub")


def test_disk_trouble_is_one_line(hub, tmp_path):
    (tmp_path / "data").write_text("a file where the folder should be", encoding="utf-8")
    assert_one_line(fetch(hub, tmp_path, "sp1024"), "data")


def test_shards_are_counted_up_to_the_first_gap():
    names = [f"fineweb_train_{index:06d}.bin" for index in (0, 1, 3)]
    files = [download.RemoteFile(f"x/{name}", 1, None, "") for name in (*names, "fineweb_val_000000.bin")]
    variant = download.load_variant("sp1024")
    assert [file.name for file in download.choose_shards(files, variant, None)] == [
        "fineweb_val_000000.bin",
        *names[:2],
    ]
    with pytest.raises(download.InputError, match=r"has 2 .*allowed: 0\.\.2"):
        download.choose_shards(files, variant, 3)


def test_specs_are_complete():
    for name, spec in SPECS.items():
        variant = download.load_variant(name)
        assert variant.val_tokens > 4e7 and variant.vocab_size in (1024, 8192)
        assert set(spec) == set(download.Variant.__dataclass_fields__)
