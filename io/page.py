"""The frame of the pages of reports: escaping of texts, security policy, common style sheet.

A page is one file. As a second barrier behind the escaping, its security policy allows only the
script and the style sheet that the package brings.
"""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path

_STYLE = Path(__file__).with_name("page.css")


def one_line(text: object) -> str:
    """Return a text in one line, each run of spaces and unprintable characters as one space.

    Unprintable are also the characters that reverse the direction of the text after them.
    """
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def escape(value: object) -> str:
    """Return a text in one line, escaped for an element or a quoted attribute."""
    return html.escape(one_line(value))


def frame_page(title: str, folder: Path, *, images: str) -> tuple[str, str]:
    """Return what comes before and after the content of a page.

    Args:
        title: the title, not yet escaped.
        folder: folder with the page's style sheet `page.css`, which follows the common one, and its
            script `page.js`.
        images: from where the page may load pictures, an expression of a security policy.
    """
    style = _STYLE.read_text(encoding="utf-8") + (folder / "page.css").read_text(encoding="utf-8")
    script = (folder / "page.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; img-src {images}; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    before = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
    )
    return before, f"<script>{script}</script>\n</body>\n</html>\n"


def _hash(content: str) -> str:
    """Return the source expression of a security policy that allows exactly this content."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
