"""Folders to the Hugging Face Hub."""

from pathlib import Path

from crate_mae.errors import UserError, first_line, not_a_repository

_CLIENTS = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}  # any that huggingface_hub uses
_LOGIN = "Log in with `hf auth login`, using a token with write access."
_OFFLINE = "Nothing was uploaded. `crate-mae export MODEL --format hf --out FOLDER` writes the same files here."


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model of crate-mae",
    token: str | bool | None = None,
) -> str:
    """Upload the files of a folder to the Hub in one commit; create the repository if it does not exist.

    Args:
        folder: its files replace those of the same names.
        repo_id: user/name.
        private: whether a new repository is private.
        revision: the branch.
        commit_message: of the commit.
        token: used instead of the one from `hf auth login`.

    Returns:
        The address of the commit.

    Raises:
        UserError: for an invalid name, without a network, or if the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=commit_message)
        return str(commit)
    except HFValidationError as error:
        raise not_a_repository(repo_id) from error
    except LocalTokenNotFoundError as error:
        raise UserError(f"{repo_id}: {_LOGIN}") from error
    except HfHubHTTPError as error:
        hint = _LOGIN if getattr(error.response, "status_code", None) in (401, 403) else _OFFLINE
        raise UserError(f"The Hugging Face Hub refused {repo_id}: {first_line(error)}\n{hint}") from error
    except Exception as error:  # network errors have a class in every HTTP library
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        raise UserError(f"{repo_id}: the Hugging Face Hub cannot be reached.\n{_OFFLINE}") from error
