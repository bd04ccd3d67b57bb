"""Pages of the site that stand elsewhere in the repository: the README is its front page."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add these pages, with links as seen from ``docs/``."""
    for page, source in PAGES.items():
        text = (Path(config.config_file_path).parent / source).read_text()
        text = text.replace("](docs/", "](")
        for other, name in PAGES.items():
            text = text.replace(f"]({name}", f"]({other}")
        files.append(File.generated(config, page, content=text))
    return files
