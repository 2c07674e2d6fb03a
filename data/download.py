"""Fetch published FineWeb token shards of the challenge from the Hugging Face hub, and check them.

    python data/download.py sp1024 --train-shards 10
    MATCHED_FINEWEB_REPO_ID=owner/repo python data/download.py sp1024

Variants are in specs.json beside this script. Files go to <out>/datasets/<folder>/ and <out>/tokenizers/.
What is there with the right size and header is kept, so a stopped download goes on with the same command; a
file gets its name only after its size, header and hash were checked. Two variables of the published
downloader are honoured: MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX.
"""

import argparse
import difflib
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
SPECS = Path(__file__).with_name("specs.json")
STAGING = ".download"
SHARD_NAME = re.compile(r"fineweb_(train|val|val_bytes)_\d{6}\.bin")


class InputError(Exception):
    """A fault to report in one line with exit status 2."""


@dataclass(frozen=True)
class Variant:
    """One entry of specs.json: where a tokenized FineWeb is published and what is known of it.

    `train_shards` is how many were published. `val_tokens` are the validation tokens that the published logs
    score, a little less than the shards hold; `val_bytes_mb` is the text they stand for, in 10^6 bytes;
    `byte_sidecar` says whether a fineweb_val_bytes_* with the bytes of each token is beside each validation
    shard.
    """

    repo: str
    prefix: str
    folder: str
    tokenizer: str
    vocab_size: int
    train_shards: int
    val_tokens: int
    val_bytes_mb: float
    byte_sidecar: bool


@dataclass(frozen=True)
class RemoteFile:
    """A file of the hub: path in the repository, size in bytes, and its SHA-256 or git blob id (hex)."""

    path: str
    size: int
    sha256: str | None
    blob_id: str

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


# --------------------------------------------------------------------------------------------- specifications


def load_variant(name: str) -> Variant:
    """The entry `name` of specs.json with the environment's overrides. Raises InputError with near names."""
    specs = json.loads(SPECS.read_text(encoding="utf-8"))
    if name not in specs:
        near = difflib.get_close_matches(name, specs, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"variant {name!r} is unknown; allowed: {', '.join(specs)}{hint}")
    fields = dict(specs[name])
    fields["repo"] = os.environ.get("MATCHED_FINEWEB_REPO_ID") or fields["repo"]
    fields["prefix"] = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", fields["prefix"]).strip("/")
    return Variant(**fields)


def remote_path(variant: Variant, *parts: str) -> str:
    """A path in the repository, under the variant's prefix (which may be empty)."""
    return "/".join(part for part in (variant.prefix, *parts) if part)


# -------------------------------------------------------------------------------------------------------- hub


class Hub:
    """The few calls of huggingface_hub this script needs, on one commit of one dataset repository.

    Every method raises InputError, in one line, for whatever the hub or the network does wrong.
    """

    def __init__(self, repo: str) -> None:
        self.library = import_hub()
        self.repo = repo
        self.api = self.library.HfApi()
        info = self.call("the repository", lambda: self.api.dataset_info(repo))
        # One commit for all files: the repository may change while they are fetched.
        self.revision = info.sha

    def call(self, what: str, action: Callable[[], object]) -> object:
        """The result of `action`; `what` names it in the error."""
        try:
            return action()
        except network_errors(self.library.errors) as error:
            raise InputError(f"{self.repo}: {self.explain(what, error)}") from None

    def explain(self, what: str, error: BaseException) -> str:
        """What went wrong while getting `what`, and how to mend it."""
        errors = self.library.errors
        where = self.api.endpoint
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"no such dataset on {where}, or it is private; check MATCHED_FINEWEB_REPO_ID or log in"
        # The hub turns a lost connection into a FileNotFoundError of its cache, and keeps it as the cause.
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, FileNotFoundError):
            return f"found no {what} on {where}; check MATCHED_FINEWEB_REMOTE_ROOT_PREFIX and the repository"
        cause = error.__cause__ or error
        reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
        return (
            f"cannot get {what} from {where}: {reason}; finished files are kept: run the same command again"
        )

    def files_in(self, folder: str) -> list[RemoteFile]:
        """The files directly in `folder` of the repository."""

        def entries() -> list[RemoteFile]:
            tree = self.api.list_repo_tree(self.repo, folder, revision=self.revision, repo_type="dataset")
            return [
                RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
                for entry in tree
                if hasattr(entry, "blob_id")
            ]

        return self.call(f"folder {folder}", entries)

    def fetch(self, file: RemoteFile, staging: Path) -> Path:
        """Download `file` into the folder `staging`; the path it has there."""
        download = self.library.hf_hub_download
        return Path(
            self.call(
                f"file {file.path}",
                lambda: download(
                    self.repo, file.path, repo_type="dataset", revision=self.revision, local_dir=staging
                ),
            )
        )


def import_hub() -> ModuleType:
    """The huggingface_hub package, made quiet. Raises InputError where it is not installed."""
    try:
        library = importlib.import_module("huggingface_hub")
        utils = importlib.import_module("huggingface_hub.utils")
        importlib.import_module("huggingface_hub.errors")
    except ImportError:
        raise InputError("the huggingface_hub package is missing; run: pip install huggingface_hub") from None
    utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    return library


def network_errors(errors: ModuleType) -> tuple[type[BaseException], ...]:
    """What a failing download may raise.

    The hub passes on the errors of its HTTP library (requests, httpx or httpx2, by version) and derives its
    own class from the base of them, so that base is taken from there. ValueError is an answer that is not
    JSON, or a malformed repository name.
    """
    return (OSError, ValueError, errors.EntryNotFoundError, *errors.HfHubHTTPError.__bases__)


# ----------------------------------------------------------------------------------------------------- checks


def shard_fault(path: Path) -> str | None:
    """What is wrong with the shard at `path`, or None: magic, version, and size = 1024 + 2 x tokens."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        return f"{size} bytes; allowed: at least the {HEADER_BYTES} of the header"
    with path.open("rb") as stream:
        magic, version, tokens = struct.unpack("<3i", stream.read(12))
    if (magic, version) != (MAGIC, VERSION):
        return f"magic {magic}, version {version}; allowed: {MAGIC}, {VERSION}"
    if size != HEADER_BYTES + 2 * tokens:
        return f"{size} bytes; its header of {tokens} tokens asks for {HEADER_BYTES + 2 * tokens}"
    return None


def file_fault(path: Path, remote: RemoteFile) -> str | None:
    """What is wrong with the downloaded file, or None: its size, and where it is a shard its header."""
    size = path.stat().st_size
    if size != remote.size:
        return f"{size} bytes; the hub lists {remote.size}"
    return shard_fault(path) if SHARD_NAME.fullmatch(remote.name) else None


def content_fault(path: Path, remote: RemoteFile) -> str | None:
    """What is wrong with the content of `path`, or None: by SHA-256, or git blob id for a small file."""
    wanted = remote.sha256 or remote.blob_id
    digest = hashlib.sha256() if remote.sha256 else hashlib.sha1(b"blob %d\0" % remote.size)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return None if digest.hexdigest() == wanted else f"hash {digest.hexdigest()}; the hub lists {wanted}"


def tokens_in(path: Path) -> int:
    """Number of tokens in the header of the shard at `path`."""
    with path.open("rb") as stream:
        return struct.unpack("<3i", stream.read(12))[2]


# ----------------------------------------------------------------------------------------------------- choice


def choose_shards(files: Iterable[RemoteFile], variant: Variant, wanted: int | None) -> list[RemoteFile]:
    """All validation shards, their byte sidecars if the variant has them, the first `wanted` train shards.

    None is 80, or all if there are fewer. Raises InputError where shards are missing or too few.
    """
    by_name = {file.name: file for file in files if SHARD_NAME.fullmatch(file.name)}
    counts = {kind: count_shards(by_name, kind) for kind in ("val", "train", "val_bytes")}
    train = min(80, counts["train"]) if wanted is None else wanted
    if train > counts["train"]:
        raise InputError(
            f"--train-shards {train}: {variant.repo} has {counts['train']} of {variant.folder}; "
            f"allowed: 0..{counts['train']}"
        )
    if not counts["val"]:
        raise InputError(f"{variant.repo}: found no fineweb_val_000000.bin in {variant.folder}")
    if variant.byte_sidecar and counts["val_bytes"] != counts["val"]:
        raise InputError(
            f"{variant.repo}: {counts['val_bytes']} fineweb_val_bytes_* for {counts['val']} validation "
            f"shards of {variant.folder}; allowed: one each, as scores in bytes need them"
        )
    sidecars = counts["val"] if variant.byte_sidecar else 0
    plan = {"val": counts["val"], "val_bytes": sidecars, "train": train}
    return [by_name[f"fineweb_{kind}_{i:06d}.bin"] for kind, count in plan.items() for i in range(count)]


def count_shards(by_name: dict[str, RemoteFile], kind: str) -> int:
    """Number of shards of `kind` from 000000 on without a gap."""
    count = 0
    while f"fineweb_{kind}_{count:06d}.bin" in by_name:
        count += 1
    return count


# -------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Settings:
    """The command line, checked."""

    variant: str
    train_shards: int | None
    out: Path
    verify: bool


def is_present(path: Path, remote: RemoteFile, verify: bool) -> bool:
    """Whether `path` is that file: size and header, and the content too for `verify` or a tokenizer."""
    if not path.is_file() or file_fault(path, remote):
        return False
    thorough = verify or not SHARD_NAME.fullmatch(remote.name)
    return not (thorough and content_fault(path, remote))


def fetch_checked(hub: Hub, remote: RemoteFile, target: Path, staging: Path) -> None:
    """Download `remote` to `target`, checked before it has that name. Raises InputError; a bad one goes."""
    fetched = hub.fetch(remote, staging)
    fault = file_fault(fetched, remote) or content_fault(fetched, remote)
    if fault:
        fetched.unlink()
        raise InputError(f"{remote.name} came bad and was removed: {fault}; run the same command again")
    target.parent.mkdir(parents=True, exist_ok=True)
    fetched.replace(target)


def plan(hub: Hub, variant: Variant, settings: Settings) -> dict[Path, RemoteFile]:
    """Every file that `settings` asks for, by its place here. Raises InputError where the hub lacks one."""
    folder = settings.out / "datasets" / variant.folder
    published = hub.files_in(remote_path(variant, "datasets", variant.folder))
    shards = choose_shards(published, variant, settings.train_shards)
    tokenizers = hub.files_in(remote_path(variant, "tokenizers"))
    wanted = [file for file in tokenizers if file.name == variant.tokenizer]
    if not wanted:
        raise InputError(f"{variant.repo}: found no {remote_path(variant, 'tokenizers', variant.tokenizer)}")
    places = {settings.out / "tokenizers" / file.name: file for file in wanted}
    return places | {folder / shard.name: shard for shard in shards}


def run(settings: Settings) -> None:
    """Fetch what `settings` asks for and is not there yet. Raises InputError."""
    variant = load_variant(settings.variant)
    hub = Hub(variant.repo)
    targets = plan(hub, variant, settings)
    # The hub's library makes the folders of the repository, which differ from those wanted here. In a folder
    # of its own a download of one repository never meets files or records of another.
    staging = settings.out / STAGING / variant.repo.replace("/", "--")
    fetched = fetch_missing(hub, targets, staging, settings.verify)
    shutil.rmtree(staging, ignore_errors=True)
    if staging.parent.is_dir() and not any(staging.parent.iterdir()):
        staging.parent.rmdir()
    print_summary(settings.out, variant, targets, fetched)


def fetch_missing(hub: Hub, targets: dict[Path, RemoteFile], staging: Path, verify: bool) -> int:
    """Fetch every target that is not there; the number fetched. Raises InputError."""
    missing = {path: remote for path, remote in targets.items() if not is_present(path, remote, verify)}
    size = sum(remote.size for remote in missing.values())
    kept = len(targets) - len(missing)
    print(f"{hub.repo} at {hub.revision}: {kept} file(s) kept, {len(missing)} to fetch, {size / 1e6:,.1f} MB")
    for number, (path, remote) in enumerate(missing.items(), 1):
        instead = " (what is there is bad)" if path.exists() else ""
        print(f"[{number}/{len(missing)}] {remote.name}, {remote.size / 1e6:,.1f} MB{instead}", flush=True)
        fetch_checked(hub, remote, path, staging)
    return len(missing)


def print_summary(out: Path, variant: Variant, targets: dict[Path, RemoteFile], fetched: int) -> None:
    """What is there now, and the settings to train on it."""
    tokens = {
        kind: sum(tokens_in(path) for path in targets if re.fullmatch(rf"fineweb_{kind}_\d+\.bin", path.name))
        for kind in ("train", "val")
    }
    print(
        f"{len(targets)} file(s), {fetched} fetched now: {tokens['train']:,} train and {tokens['val']:,} "
        "validation tokens"
    )
    if tokens["val"] < variant.val_tokens:
        print(
            f"note: published scores of this variant are over {variant.val_tokens:,} validation tokens "
            f"({variant.val_bytes_mb} MB of text); this repository has fewer, so scores do not compare"
        )
    data = shlex.quote(str(out / "datasets" / variant.folder))
    tokenizer = shlex.quote(str(out / "tokenizers" / variant.tokenizer))
    print("to train:")
    knobs = f"VOCAB_SIZE={variant.vocab_size}" + " CASEOPS_ENABLED=1" * variant.byte_sidecar
    print(f"DATA_PATH={data} TOKENIZER_PATH={tokenizer} {knobs} python train_gpt.py")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports a fault as InputError, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{message}; see --help")


def shard_count(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a whole number, 0 or more")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = OneLineParser(description="Fetch published FineWeb token shards.", allow_abbrev=False)
    parser.add_argument("variant", help="a name in specs.json: sp1024, sp8192, caseops")
    parser.add_argument(
        "--train-shards", type=shard_count, metavar="N", help="train shards of 10^8 tokens, the first N (80)"
    )
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="FOLDER", help="where to (data)")
    parser.add_argument("--verify", action="store_true", help="also check the content of files already there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; 0, 2 with one line on stderr, or 130 when interrupted."""
    try:
        run(Settings(**vars(build_parser().parse_args(argv))))
    except InputError as error:
        message, status = str(error), 2
    except OSError as error:
        message, status = f"{error.filename or 'the system'}: {error.strerror or error}", 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command goes on with the files still missing", 130
    else:
        return 0
    print(f"download.py: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
