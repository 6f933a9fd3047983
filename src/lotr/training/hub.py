"""A finished run on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError, ConfigError


def check_hub(repository: str) -> None:
    """Refuse an upload that would fail when the run is over.

    Raises:
        ConfigError: The hub cannot be reached, or nobody is logged in; or the name is none.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().repo_exists(repository)
        HfApi().whoami()
    except Exception as error:  # of whichever library the hub's uses to connect
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"push_to_hub={repository!r} would fail: {reason} Log in with `hf auth login`; or leave it out, and upload "
            f"later: hf upload {repository} OUTPUT"
        ) from None


def upload(folder: Path, repository: str) -> str:
    """Upload the files of a finished run, in a private repository where there is none yet; return its address.

    Raises:
        CheckpointError: It failed; the files are in the folder.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        return str(HfApi().upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["runs/**"]))
    except Exception as error:  # as above
        raise CheckpointError(
            f"The adapter is whole in {folder}, and its upload failed: {error} Upload it later: "
            f"hf upload {repository} {folder}"
        ) from error
