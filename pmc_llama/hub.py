"""An exported model to the Hugging Face Hub, by its own library: what would go up, and the upload."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from data_tools.errors import UserError


def listing(directory: Path, repository: str) -> str:
    """What an upload of `directory` would send: a line a file, and the sum, in bytes."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    width = len(f"{sum(sizes):,}")
    lines = [
        f"{size:>{width},}  {path.relative_to(directory)}" for path, size in zip(files, sizes, strict=True)
    ]
    return "\n".join([f"would go to {repository}:", *lines, f"{sum(sizes):>{width},}  bytes in all"])


def upload(directory: Path, repository: str, private: bool) -> str:
    """Make the repository where there is none, and upload everything in `directory` as one commit.

    The token is the one that huggingface_hub finds: `HF_TOKEN`, or what `hf auth login` kept.

    Args:
        directory: a complete export.
        repository: `OWNER/NAME`.
        private: of a repository that is made.

    Returns:
        The address of the model.

    Raises:
        UserError: there is no token, it may not write there, or the connection failed. The export stays.
    """
    api = HfApi(library_name="pmc-llama")
    again = f"the model stays in {directory}; `hf upload {repository} {directory}` sends it again"
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Upload by pmc-llama")
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"There is no token for {api.endpoint}: set HF_TOKEN or run `hf auth login`; {again}."
        ) from error
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repository}: {error}") from error
    except Exception as error:  # of its HTTP library, which is another one in each of its versions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{repository} could not be uploaded to {api.endpoint} ({reason}); {again}."
        ) from error
    return str(address)
