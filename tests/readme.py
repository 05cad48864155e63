"""What the project tells its readers: the README and the pages of ``docs``, whose scripts run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "pgrealtime" / "docs").glob("*.md")))
README, *_ = TEXTS = tuple(page.read_text(encoding="utf-8") for page in PAGES)
TEXT = "\n".join(TEXTS)


def script(beginning: str) -> str:
    """Return the one script that begins so, behind the slashes of its comment."""
    (found,) = re.findall(rf"```js\n((?:// )?{re.escape(beginning)}.*?)```", TEXT, re.DOTALL)
    return str(found)
