"""Push an export to the Hugging Face Hub: its files, and its model card with what the Hub shows of it."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCardData, get_token
from huggingface_hub.utils import validate_repo_id

from trainer.commands.loaded import ABOUT
from trainer.commands.model_card import public
from trainer.errors import UsageError


def check(repo: str) -> None:
    """Check what can be known before an export is written.

    Raises:
        UsageError: this is no name of a repository, or nobody is logged in.
    """
    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise ValueError("it names no user or organisation")
    except ValueError as error:
        raise UsageError(f"--push {repo}: expected USER/NAME; {error}") from None
    if get_token() is None:
        raise UsageError(f"--push {repo} needs a token of the Hub that may write: hf auth login, or set HF_TOKEN.")


def push(folder: Path, repo: str, *, about: dict[str, Any], name: str) -> str:
    """Push the files of an export in one commit; a repository that does not exist is made, and is private.

    Args:
        folder: of the export.
        repo: USER/NAME.
        about: the content of model.json.
        name: of the run.

    Returns:
        The address of the repository.

    Raises:
        OSError: the Hub cannot be reached, or refuses.
    """
    card = front_matter(about, name) + (folder / "README.md").read_text(encoding="utf-8")
    card += "\n## From the Hub\n\n```python\nimport trainer\nfrom huggingface_hub import snapshot_download\n"
    card += f'loaded = trainer.load(snapshot_download("{repo}"))\n```\n'
    extra = [path.name for path in folder.glob("*.onnx.data")]
    adds = [CommitOperationAdd(name, str(folder / name)) for name in [ABOUT, *about["files"], *extra]]
    adds.append(CommitOperationAdd("README.md", card.encode()))
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        place = api.create_repo(repo, private=True, exist_ok=True)
        api.create_commit(repo, adds, commit_message=f"{name}: {about['checkpoint']}")
    except Exception as error:  # whatever the client of the Hub raises; its errors of connections differ by version
        text = str(error).strip().splitlines()[0]
        again = f"The export stands in {folder}; push it again with --overwrite."
        raise OSError(f"cannot push to {repo}: {text}. {again}") from error
    return str(place)


def front_matter(about: dict[str, Any], name: str) -> str:
    """What the Hub reads of a model card: library, task, tags, and the metrics of the validation."""
    data = str(public(about["config"]["data"]["data"]))
    task: dict[str, Any] = {"task_type": "image-classification", "dataset_type": data, "dataset_name": data}
    metrics = about["metrics"].get("val", {})
    results = [EvalResult(**task, metric_type=key, metric_value=value) for key, value in sorted(metrics.items())]
    tags = ["accelerate", *filter(None, [(about["builder"] or {}).get("name")])]
    card = ModelCardData(
        model_name=name, library_name="pytorch", pipeline_tag=task["task_type"], tags=tags, eval_results=results
    )
    return f"---\n{card.to_yaml()}\n---\n"
