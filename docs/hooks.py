"""For the site: what pages show of the repository outside of `docs` comes along; what they only name stays text."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_files(files, config):
    """Pictures of other folders, under the names that these have in the repository."""
    for page in list(files.documentation_pages()):
        for picture, _, path, _ in OUTSIDE.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            if picture and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, **_):
    return OUTSIDE.sub(lambda found: f"![{found[2]}]({found[3]})" if found[1] else found[2], markdown)
