"""`--push-to-hub`: the adapter of a run, its losses and a model card, in a repository on the hub."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from unilora_cli.tasks.models import readable_errors
from unilora_transformers.saving import card_header

__all__ = ["card", "push", "repository"]

MADE = "<!-- The next run writes this card anew, unless this line is gone. -->"


def repository(name: str, private: bool) -> str:
    """Make the repository of a run, if need be; return its whole name.

    Args:
        name: USER/NAME, or NAME alone, which the hub takes for the caller's.
        private: whether one that is made now is private; one that is there stays as it is.

    Raises:
        CommandError: the name is none, the hub is not reached, or it does not know the caller.
    """
    with readable_errors(f"--push-to-hub {name}: the hub does not take it"):
        return HfApi().create_repo(name, private=private or None, exist_ok=True).repo_id


def push(name: str, files: Sequence[Path], text: str) -> str:
    """Upload files in one commit, with a model card unless the repository has one of its owner's; return the commit's
    address.
    """
    api = HfApi()
    operations = [CommitOperationAdd(path.name, path) for path in files]
    there = api.file_exists(name, "README.md") and Path(api.hf_hub_download(name, "README.md")).read_text("utf-8")
    if not there or MADE in there:
        operations.append(CommitOperationAdd("README.md", text.encode()))
    return str(api.create_commit(name, operations, commit_message="Upload adapter").commit_url)


def card(name: str, base: str, rows: Sequence[tuple[str, str]], merging: str) -> str:
    """Write the model card of a run: its base, its results, and the command that merges it."""
    lines = [
        *card_header(base),
        "",
        MADE,
        "",
        f"# Adapter of {Path(base).name if Path(base).exists() else base}",
        "",
        "One vector θ_d adapts the whole model ([Uni-LoRA](https://arxiv.org/abs/2506.00799)).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows),
        "",
        "```bash",
        f"hf download {name} adapter.safetensors --local-dir .",
        merging,
        "```",
        "",
    ]
    return "\n".join(lines)
