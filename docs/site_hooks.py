"""Hooks of MkDocs.

Files outside of docs/ that a page links to, results and sources, come along with the site; links to
folders and to the README become plain text. Roles in docstrings, such as ``:class:``, which
Markdown does not know, are left out, and so are the colons that announce a literal block there.
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FOLDER = "repository"  # of the site
LITERAL = re.compile(r"<p>::</p>\n?|:(?=:</p>)")
ROLE = re.compile(r":(?:mod|class|func|meth|attr):(?=<code>)")
LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)\s#]+)\)")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    root = Path(config.docs_dir).parent
    folder = PurePosixPath(page.file.src_uri).parent
    up = "../" * len(folder.parts)

    def move(link: re.Match[str]) -> str:
        target = (Path(config.docs_dir) / folder / link[2]).resolve()
        if target.is_relative_to(config.docs_dir) or not target.exists():
            return link[0]
        if target.is_dir() or target.suffix == ".md":
            return link[1]
        uri = f"{FOLDER}/{target.relative_to(root).as_posix()}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=target.read_bytes()))
        return f"[{link[1]}]({up}{uri})"

    return LINK.sub(move, markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    return LITERAL.sub("", ROLE.sub("", html))
