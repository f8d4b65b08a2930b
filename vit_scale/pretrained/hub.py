"""Read models from the Hugging Face Hub, and write them there.

A model's address is hf://ORG/NAME[@REVISION][/FILE]; ORG/NAME alone will do where neither exists on
the disk. A revision is resolved to its commit, so that what was read can be named for good. The
package `huggingface_hub` does the transfers, with its own cache (HF_HOME) and token (HF_TOKEN, or
`hf auth login`); what is in the cache needs no network.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any

from ml_collections import ConfigDict

from vit_scale.errors import FAILED, RESUMABLE, UserError, nearest
from vit_scale.pretrained import weight_files
from vit_scale.pretrained.weight_files import FILE_NAMES, INDEX_SUFFIX, METADATA_FILES, SUFFIXES
from vit_scale.storage.download import Unreachable
from vit_scale.storage.errors import exit_code, one_line
from vit_scale.storage.paths import HUB

NAME = re.compile(r"[\w.-]+/[\w.-]+")
BARE = re.compile(NAME.pattern + r"(@[\w.-]+)?")
COMMIT = re.compile(r"@[0-9a-f]{40}(/|$)")
INSTALL = "launch/environment.sh hub in a clone, or pip install huggingface_hub"
CARD = "README.md"
LOG_IN = "run `hf auth login`, or set HF_TOKEN"


def is_address(source: str | os.PathLike) -> bool:
    """Return whether a model on the Hub is meant: hf://..., or ORG/NAME where ORG is no folder.

    runs/NAME is a path in any case: a run that is not there is not asked for on the Hub.
    """
    text = os.fspath(source)
    if text.startswith(HUB):
        return True
    folder = text.partition("/")[0]
    named = BARE.fullmatch(text) and not text.endswith(SUFFIXES)
    return bool(named) and folder != "runs" and not os.path.isdir(folder)


def pinned(source: str | os.PathLike) -> str | os.PathLike:
    """Return the address of a model on the Hub with its commit, and any other source as it is.

    Raises UserError where there is no such model or revision, and Unreachable without a network.
    """
    if not is_address(source):
        return source
    source = os.fspath(source)
    if COMMIT.search(source):
        return HUB + source.removeprefix(HUB)
    hub = _package(source)
    with _errors(source):
        uri = _parse(source)
        commit = hub.HfApi().resolve_revision(uri.id, revision=uri.revision).resolved
    return f"{HUB}{uri.id}@{commit}" + (f"/{uri.path_in_repo}" if uri.path_in_repo else "")


def with_commit(cfg: ConfigDict) -> ConfigDict:
    """Return a config whose init.source, if it is on the Hub, is named by its commit (`pinned`)."""
    source = pinned(cfg.init.source)
    if source != cfg.init.source:
        cfg = cfg.copy_and_resolve_references()
        cfg.init.source = source
    return cfg


def fetch(address: str) -> pathlib.Path:
    """Return the weight file at a `pinned` address, in the cache, with the metadata beside it.

    Of a repository it is the first of FILE_NAMES that is there. Raises UserError.
    """
    hub = _package(address)
    with _errors(address):
        uri = _parse(address)

        def download(*names: str) -> pathlib.Path:
            patterns = [re.sub(r"([\[*?])", r"[\1]", name) for name in names]
            folder = hub.snapshot_download(uri.id, revision=uri.revision, allow_patterns=patterns)
            return pathlib.Path(folder)

        parent = uri.path_in_repo.rpartition("/")[0]
        names = [*METADATA_FILES, f"{pathlib.PurePosixPath(uri.path_in_repo).stem}.json"]
        folder = download(CARD, *(f"{parent}/{name}".lstrip("/") for name in names))
        tree = hub.get_cached_repo_tree(uri.id, revision=uri.revision)
        file = _choose(address, uri.path_in_repo, {entry.path for entry in tree})
        download(file)
        if file.endswith(INDEX_SUFFIX):
            shards = weight_files.shard_names(folder / file)
            download(*(f"{parent}/{name}".lstrip("/") for name in shards))
    return folder / file


def _choose(address: str, file: str, names: Collection[str]) -> str:
    """The name of the weight file in a repository of files `names`. Raises UserError."""
    weights = [name for name in sorted(names) if name.endswith((*SUFFIXES, INDEX_SUFFIX))]
    if file:
        if file not in names:
            raise UserError(f"{address}: the repository has no such file; {nearest(file, weights)}")
        return file
    if chosen := next((name for name in FILE_NAMES if name in names), None):
        return chosen
    others = f"; give one of its files, {address}/FILE: {', '.join(weights)}" if weights else ""
    raise UserError(f"{address} has no {' or '.join(FILE_NAMES)}{others}")


def licence(address: str) -> str:
    """The licence that the model's card states, "" if none; of a model that was fetched before."""
    content: Any = {}
    with contextlib.suppress(Exception):  # no package; and a card may hold anything
        hub, uri = _package(address), _parse(address)
        card = hub.try_to_load_from_cache(uri.id, CARD, revision=uri.revision)
        content = hub.metadata_load(card)
    stated = (content or {}).get("license")
    if stated == "other":
        stated = content.get("license_name")
    return stated if isinstance(stated, str) else ""


def check_push(name: str) -> None:
    """Raise UserError where nothing can be pushed to the repository `name`."""
    if not NAME.fullmatch(name):
        raise UserError(f"--push {name!r} is not the name of a repository: ORG/NAME")
    hub = _package(f"--push {name}")
    if hub.is_offline_mode():
        raise UserError(f"--push {name} needs a network, and HF_HUB_OFFLINE is set: unset it")
    if not hub.get_token():
        raise UserError(f"--push {name} needs a token that may write there: {LOG_IN}")


def push(
    folder: pathlib.Path, files: Collection[str], name: str, private: bool, message: str
) -> str:
    """Upload `files` of a folder to the repository `name`, made if need be, as one commit.

    Returns its address. Raises UserError, also where `private` is wanted and the repository is
    public.
    """
    api, again = _package(name).HfApi(), f"{folder} is complete: rerun the command to upload it"
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise UserError(f"{HUB}{name} is public, not private; nothing was uploaded: {again}")
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=sorted(files),
            commit_message=message,
        )
    except UserError:
        raise
    except Exception as error:  # the clients raise many types
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = f"the token may not write there: {LOG_IN}; " if status in (401, 403) else ""
        raise UserError(
            f"cannot push to {HUB}{name}: {one_line(error)}; {advice}{again}"
        ) from error
    return f"{HUB}{name}@{commit.oid}"


def _package(source: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        local = "" if "hf://" in source or source.startswith("--") else "does not exist here, and "
        raise UserError(
            f"{source} {local}needs the package huggingface_hub for the Hugging Face Hub: {INSTALL}"
        ) from error
    return huggingface_hub


def _parse(source: str) -> Any:
    """Return huggingface_hub's HfUri of a model. Raises UserError for a data set or a space."""
    uri = _package(source).parse_hf_uri(HUB + source.removeprefix(HUB))
    if uri.type != "model":
        raise UserError(f"{source} is a {uri.type}, not a model: {HUB}ORG/NAME[@REVISION]")
    return uri


@contextlib.contextmanager
def _errors(source: str) -> Iterator[None]:
    """Turn what huggingface_hub raises about `source` into one line."""
    errors = _package(source).errors
    nowhere = "" if source.startswith(HUB) else f"{source} does not exist here, and "
    name = source.removeprefix(HUB)
    repository = "/".join(name.split("/")[:2]).partition("@")[0]
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            f"{HUB}{repository} is gated: accept its conditions on its page on the Hub, then "
            f"{LOG_IN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{nowhere}the Hub has no model {repository}, or it is private: correct the name, or "
            f"{LOG_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{source}: {repository} has no such revision on the Hub") from error
    except (errors.HfUriError, errors.HFValidationError) as error:
        raise UserError(f"{source}: {one_line(error)}") from error
    except Exception as error:  # also those of the HTTP client, xet, and the disk
        raise _failure(error, source, repository, nowhere) from error


def _failure(error: Exception, source: str, repository: str, nowhere: str) -> UserError:
    hub = _package(source)
    offline = isinstance(
        error,
        (
            hub.errors.RevisionResolutionError,
            hub.errors.LocalEntryNotFoundError,
            hub.errors.CachedRepoTreeNotFoundError,
        ),
    )
    if offline or type(error).__module__.partition(".")[0].startswith("httpx"):
        reason = "HF_HUB_OFFLINE is set" if hub.is_offline_mode() else "the Hub can't be reached"
        return Unreachable(
            f"{nowhere}{HUB}{repository} is not in the cache, and {reason}; on a machine with a "
            f"network run `hf download {repository} --local-dir DIR`, and give DIR",
            FAILED if hub.is_offline_mode() else RESUMABLE,
        )
    return UserError(
        f"cannot download {source}: {one_line(error)}; rerun the same command", exit_code(error)
    )
