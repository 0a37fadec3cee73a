"""Write the Python of README, docs and notebooks as modules, one a page, for type checkers: ``snippets.py FOLDER``.

A page's blocks follow each other in one module, as its reader runs them.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks(page: Path) -> list[str]:
    """The page's blocks of Python: those fenced as such in Markdown, a notebook's code cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def main(folder: Path) -> None:
    """Write the modules into `folder`, which may exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("notebooks/*.ipynb"))):
        found = blocks(page)
        if found:
            name = "page_" + re.sub(r"\W", "_", page.stem.lower())
            (folder / f"{name}.py").write_text("\n".join(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
