"""Datasets of the Hugging Face hub: `hf://datasets/ORG/NAME[@REVISION][/GLOB]` to a local folder and the glob.

The hub's own client keeps what it fetched under HF_HOME (or HF_HUB_CACHE) and sends the token of the environment. With
HF_HUB_OFFLINE=1 only that cache is read. The folder lies on the machine that lists the sources: on a cluster of several
nodes the cache must be on storage that all of them see.
"""

from __future__ import annotations

import re
from pathlib import Path

from raymill.errors import DataError

SCHEME = "hf://"
_FORM = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<pattern>.+))?/?")
_METADATA_TIMEOUT_S = 20.0


def check(uri: str) -> None:
    """Raises ValueError when it is not the name of a dataset."""
    if _FORM.fullmatch(uri) is None:
        raise ValueError(f"{uri} names no dataset; fix: write hf://datasets/ORG/NAME[@REVISION][/GLOB]")


def fetch(uri: str) -> tuple[Path, str]:
    """The folder with the dataset's files, and the glob that picks among them (empty: all). Raises DataError."""
    match = _FORM.fullmatch(uri)
    assert match is not None, uri
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repo, revision, pattern = match["repo"], match["revision"], (match["pattern"] or "").strip("/")
    allowed = [pattern, f"{pattern}/**"] if pattern else None
    try:
        folder = snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=allowed, etag_timeout=_METADATA_TIMEOUT_S
        )
    except HFValidationError as error:
        why, fix = str(error), "write hf://datasets/ORG/NAME[@REVISION][/GLOB]"
        raise DataError(f"{uri} names no dataset", where="prepare.sources", why=why, fix=fix) from None
    except Exception as error:  # the client's errors, and those of whichever HTTP library it uses
        fix = "check name, network and HF_TOKEN; without a network fetch it once elsewhere, share HF_HOME, set HF_HUB_OFFLINE=1"
        why = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no answer'}"
        )
        raise DataError(f"{uri} cannot be had", where="prepare.sources", why=why, fix=fix) from None
    return Path(folder), pattern
