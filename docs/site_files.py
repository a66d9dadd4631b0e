"""Build the docs site from the files where GitHub shows them, so that a link that works there works in the site.

MkDocs calls it (``hooks`` in mkdocs.yml): paths of pages count from the root of the repository, not from docs/.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PUBLISHED = ("*.md", "LICENSE", "docs/**/*.md", "docs/*.png", "benchmarks/*.md", "benchmarks/*.py", "results/*/*")
PUBLISHED += ("qandc/assets/*/README.md",)


def on_files(files: Files, config: Any) -> Files:
    """Give MkDocs the documents of the whole repository in the place of those in docs/; keep what the theme brings."""
    ours = [
        File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
        for pattern in PUBLISHED
        for path in sorted(ROOT.glob(pattern))
    ]
    return Files([*(file for file in files if file.src_dir != config.docs_dir), *ours])
