"""Upload of a model to Hugging Face's hub."""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from gpt_lightning.data.tokenizer import GPT2, Tokenizer
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.pretrained.convert import save_model


def push_to_hub(
    model: GPTModel, repo_id: str, *, private: bool | None = None, tokenizer: Tokenizer = GPT2
) -> str:
    """Upload a model to Hugging Face's hub in the format 'hf', as one commit; returns its URL.

    ``GPT2LMHeadModel.from_pretrained(repo_id)`` loads it. The repository is created if it does not exist. You need
    ``pip install 'gpt-lightning[hub]'`` and ``hf auth login``.

    Args:
        repo_id: ``USER/NAME``.
        private: Whether a new repository is private. ``None``: what your account has as default.
        tokenizer: The model's, see :func:`load_tokenizer`.

    Raises:
        ValueError: As for :func:`save_model`.
        OSError: huggingface_hub is not installed, or the upload fails.
    """
    if find_spec("huggingface_hub") is None:
        raise OSError(
            "push_to_hub: needs huggingface_hub; install it with pip install 'gpt-lightning[hub]'"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(model, folder, tokenizer=tokenizer)
        hub = HfApi()
        try:
            hub.create_repo(repo_id, private=private, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload by gpt_lightning"
            )
        except (HFValidationError, OSError) as error:  # OSError: also every error of the host
            cause = " ".join(str(error).split())
            raise OSError(
                f"push_to_hub: {repo_id} cannot be uploaded ({cause}); check the name and hf auth login"
            ) from error
    return str(commit.commit_url)
