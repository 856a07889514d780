"""
Make the site from pages that lie all over the repository; .github/mkdocs.yml calls these functions.

Links are written for the repository. On the site a link to another page leads to that page, a link to code or data
leads to the repository, and stays text where no address of the repository is known.
"""

import os
import posixpath
import re
import tomllib
from pathlib import Path

import reference
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[2]
# Place in the repository: page of the site. Everything in recipes/ is there under its own name.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    ".github/CONTRIBUTING.md": "contributing.md",
    ".github/SECURITY.md": "security.md",
    "hf_lm/interop/README.md": "interop.md",
} | {
    str(path.relative_to(REPOSITORY)): str(path.relative_to(REPOSITORY))
    for path in sorted((REPOSITORY / "model_cards").rglob("*"))
    if path.name.startswith("README.") or path.suffix == ".png"
}
GUIDES = ("train", "fine_tune", "import_export", "run_elsewhere", "share", "scale", "troubleshoot")


def repository_url() -> str:
    """The address in pyproject.toml, or that of the repository in which GitHub runs this; else none."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    urls = {name.lower(): url for name, url in project.get("urls", {}).items()}
    if "GITHUB_REPOSITORY" in os.environ:
        return f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}"
    return urls.get("repository", urls.get("source", ""))


def on_config(config):
    """Set the address of the repository and the navigation."""

    def named(pattern: str) -> list[str]:
        found = sorted(path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).glob(pattern))
        return sorted(found, key=lambda name: not name.endswith("README.md"))

    config.repo_url = repository_url() or None
    outside = {"benchmarks", "guides", "log"}
    config.nav = [
        {"hf_lm": ["index.md", {"中文": "guides/README.zh.md"}]},
        {"Guides": [*named("guides/*.ipynb"), *(f"guides/{name}.md" for name in GUIDES), "interop.md"]},
        {"Recipes": [name for name in named("*/README.md") if name.split("/")[0] not in outside]},
        {"Results": [
            {"Benchmarks": named("benchmarks/*.md")},
            {"Log": ["LOG.md", *named("log/*.md")]},
            {"Model cards": ["model_cards/README.md"]},
        ]},
        {"Reference": ["guides/reference.md", *(f"reference/{name}" for name in reference.pages())]},
        {"Project": ["contributing.md", "changelog.md", "security.md"]},
    ]  # fmt: skip
    return config


def on_files(files: Files, config) -> Files:
    """Keep pages and pictures of recipes/, not its code and data; add those that lie elsewhere, and the reference."""
    for file in list(files):
        if file.src_dir == config.docs_dir and not file.src_uri.endswith((".md", ".ipynb", ".png")):
            files.remove(file)
    for source, uri in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(REPOSITORY / source)))
    for name, text in reference.pages().items():
        files.append(File.generated(config, f"reference/{name}", content=text))
    return files


def follow(link: str, uri: str) -> str | None:
    """
    Where a link of the repository leads on the site.

    Args:
        link: as it is written, without the part after `#`.
        uri: the page on which it stands, such as `guides/train.md`.

    Returns:
        a link from this page, or None if its target is neither on the site nor has an address. A link that is broken
        in the repository comes back as it is, so that mkdocs warns of it.
    """
    source = next((place for place, page in ELSEWHERE.items() if page == uri), f"recipes/{uri}")
    target = (REPOSITORY / source).parent / link
    if not target.exists():
        return link
    place = target.resolve().relative_to(REPOSITORY).as_posix()
    if place in ELSEWHERE or place.startswith("recipes/") and target.suffix in (".md", ".ipynb"):
        return posixpath.relpath(ELSEWHERE.get(place, place.removeprefix("recipes/")), posixpath.dirname(uri) or ".")
    return f"{repository_url()}/blob/HEAD/{place}" if repository_url() else None


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Lead links of the repository to the site, and put the generated sections into the reference."""
    uri = page.file.src_uri
    if uri.startswith("reference/"):
        return markdown

    def led(match: re.Match) -> str:
        text, link, rest = match.groups()
        found = link if re.match(r"\w+:", link) else follow(link, uri)
        return f"[{text}]({found}{rest})" if found else text

    markdown = re.sub(r"\[([^\[\]]*)\]\(([^)\s#]+)([^)]*)\)", led, markdown)
    if uri == "guides/reference.md":
        for name, write in reference.SECTIONS.items():
            markdown = markdown.replace(f"<!-- {name} -->", write())
    return markdown


def on_page_content(html: str, page, config, files: Files) -> str:
    """Lead the links of notebooks, which are HTML by now."""
    uri = page.file.src_uri
    if not uri.endswith(".ipynb"):
        return html

    def led(match: re.Match) -> str:
        found = follow(match[1], uri)
        target = files.get_file_from_path(posixpath.normpath(posixpath.join(posixpath.dirname(uri), found or "")))
        return f'href="{target.url_relative_to(page.file)}{match[2] or ""}"' if target else f'href="{found or ""}"'

    return re.sub(r'href="([^":#]+\.(?:md|ipynb|py))(#[^"]*)?"', led, html)
