"""The form of Markdown files, for those that are generated: `make lint` checks the others with the same tool."""

import mdformat


def formatted(text: str) -> str:
    """Markdown with prose wrapped at 100 columns, as `.mdformat.toml` asks."""
    options = {"wrap": 100, "number": True, "compact_tables": True}
    return mdformat.text(text, options=options, extensions={"gfm", "tables"})
