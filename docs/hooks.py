"""Put results/ into the manual, where its pages link to it.

A page links to `../results/plan/README.md`, which is right in the repository. In the built site
the same file is a page below the site's own results/.
"""

import pathlib

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHOWN = ("README.md", "*.png", "*.svg")


def on_files(files, config):
    """Add the reports of results/, and their pictures, to the files of the site."""
    for pattern in SHOWN:
        for file in sorted((ROOT / "results").rglob(pattern)):
            name = file.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point the links that leave docs/ for results/ to the pages that `on_files` adds."""
    return markdown.replace("](../results/", "](results/")
