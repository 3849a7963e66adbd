"""What the site needs so that pages stay readable on GitHub: links that leave docs/, their pictures, CONTRIBUTING."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")  # a relative one that goes up
WORDS = re.compile(r"^(```\w+) .+$", re.M)  # what tests read behind a fence's language; no fence to Markdown
PICTURES = {".png", ".svg"}


def outside(page: str, link: str) -> Path | None:
    """The path, from the repository's root, of a link that leaves docs/; None for one that stays in it."""
    path = Path(os.path.normpath(DOCS / Path(page).parent / link))
    return None if path.is_relative_to(DOCS) else path.relative_to(ROOT)


def contributing() -> str:
    """CONTRIBUTING.md as a page of docs/."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    text = re.sub(r"\]\((?!https?:|#)", "](../", text)
    return text.replace("](../docs/", "](")


def on_files(files, config):
    """The files of the site, with CONTRIBUTING and every picture outside docs/ that a page shows."""
    from mkdocs.structure.files import File  # here, as the pages are tested without mkdocs

    files.append(File.generated(config, "contributing.md", content=contributing()))
    for page in files.documentation_pages():
        for _, link in LINK.findall(page.content_string):
            path = outside(page.src_uri, link)
            if path and path.suffix in PICTURES and not files.get_file_from_path(path.as_posix()):
                files.append(File.generated(config, path.as_posix(), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """The text of a page, with links out of docs/ to the copied picture or to the repository, and plain fences."""

    def moved(found: re.Match[str]) -> str:
        path = outside(page.file.src_uri, found[2])
        if path is None or not (ROOT / path).exists():  # mkdocs warns of a link to nothing, which fails the build
            return found[0]
        if files.get_file_from_path(path.as_posix()):
            return found[1] + os.path.relpath(path, Path(page.file.src_uri).parent)
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{found[1]}{config.repo_url}/{kind}/main/{path.as_posix()}"

    return LINK.sub(moved, WORDS.sub(r"\1", markdown))
