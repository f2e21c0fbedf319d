"""Files into a repository of the Hugging Face Hub, by the Hub's own client.

A repository is made private unless asked otherwise, and files never go into a public one by mistake: what was public before must be
asked for as public again. All files go up in one commit, so that nobody sees half of them. `HF_ENDPOINT` names another Hub,
`HF_TOKEN` or `hf auth login` says who one is.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from reverie.errors import ConfigError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def upload(files: Sequence[Path], repository: str, *, public: bool, message: str) -> str:
    """Makes the repository if there is none, puts `files` into it under their names, and answers its address.

    Who asks, and whether the repository is what was asked for, is known before the first byte of a file goes out.

    Args:
        repository: Such as `me/resnet18-w4a8`.
        public: Whether everybody may read it.
        message: Of the commit.

    Raises:
        ConfigError: huggingface_hub is not installed, there is no valid token, the Hub does not answer or refuses, or the repository is public and
            was not asked for as such.
    """
    hub = _library()
    with _told(repository):
        hub.utils.validate_repo_id(repository)
        token = hub.get_token()
        if token is None:
            raise ConfigError(
                "push must have a token of the Hugging Face Hub, got none; `hf auth login` stores one, or set HF_TOKEN"
            )
        api: HfApi = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
        api.whoami()
        if not api.repo_exists(repository):
            api.create_repo(repository, private=not public)
        elif not public and not api.model_info(repository).private:
            raise ConfigError(
                f"{repository}: must be private without --public, got a repository that everybody may read; choose another, or say --public"
            )
        parts = [hub.CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
        api.create_commit(repository, parts, commit_message=message)
        return f"{api.endpoint}/{repository}"


def _library() -> ModuleType:
    try:
        import huggingface_hub.utils
    except ModuleNotFoundError:
        raise ConfigError("push must have huggingface_hub, got no such module; pip install 'reverie[models]'") from None
    return huggingface_hub


@contextmanager
def _told(repository: str) -> Iterator[None]:
    """What the client raises, in one line of ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError:
        raise ConfigError(
            f"the repository must be OWNER/NAME in letters, digits, '-', '_' and '.', got {repository!r}; such as me/resnet18-w4a8"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        cure = "log in with `hf auth login`" if status == 401 else "check its name, and that the token may write there"
        raise ConfigError(f"{repository}: the Hub must accept the request, got status {status}; {cure}") from error
    # Where nobody answers: an error of the client's HTTP library, of which the client's own is one; the library changes between versions.
    except errors.HTTPError as error:  # type: ignore[attr-defined]
        place = os.environ.get("HF_ENDPOINT", "huggingface.co")
        raise ConfigError(f"{place}: the Hub must answer, got {str(error)!r}; check the connection") from error
