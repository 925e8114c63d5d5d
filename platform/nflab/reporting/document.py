"""A document of sections, as Markdown beside its files and as one HTML page that needs nothing."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from nflab.terminal.wording import short

OPEN_ROWS = 40
"""Tables with more rows are folded in the page."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
h1,h2,h3{line-height:1.2} h2{border-bottom:1px solid #ccc;margin-top:2.5rem}
img{max-width:100%} .wide{overflow-x:auto} .paper{border-left:4px solid #ccc;padding-left:1rem}
table{border-collapse:collapse;font-size:13px} td,th{padding:2px 10px;text-align:right}
th{cursor:pointer;border-bottom:1px solid #999} tr:nth-child(even) td{background:#f5f5f5}
"""

_SORT = """
document.addEventListener('click', event => {
  const head = event.target.closest('th');
  if (!head) return;
  const column = [...head.parentNode.children].indexOf(head);
  const body = head.closest('table').tBodies[0];
  const down = head.dataset.down = head.dataset.down === '1' ? '0' : '1';
  const key = row => row.children[column].textContent;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)], n = parseFloat(x) - parseFloat(y);
    return isNaN(n) ? x.localeCompare(y) : n;
  });
  body.append(...(down === '1' ? rows.reverse() : rows));
});
"""


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it, in this order."""

    title: str
    level: int = 2
    text: Sequence[str] = ()
    """Paragraphs of plain text."""
    paper: str | None = None
    """What the paper found."""
    figures: Sequence[Path] = ()
    """PNG files, in the document's folder or below it."""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Caption -> table."""


def to_markdown(sections: Sequence[Section], folder: Path) -> str:
    """The document for a file in `folder`; figures are linked."""
    parts = []
    for section in sections:
        parts.append(f"{'#' * section.level} {section.title}")
        if section.text:
            parts.append("\n".join(f"- {line}" for line in section.text))
        if section.paper:
            parts.append(f"> {section.paper}")
        parts += [
            f"![{figure.stem}]({figure.relative_to(folder).as_posix()})"
            for figure in section.figures
        ]
        for caption, table in section.tables.items():
            parts += [f"**{caption}**", _markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: pd.DataFrame) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    head = [str(column).replace("_", " ") for column in table.columns]
    body = [line([short(value) for value in row]) for row in table.itertuples(index=False)]
    return "\n".join([line(head), line(["---:"] * len(head)), *body])


def to_html(sections: Sequence[Section], title: str) -> str:
    """The document as one page: figures are in it, and nothing is fetched."""
    parts = []
    for section in sections:
        parts.append(f"<h{section.level}>{html.escape(section.title)}</h{section.level}>")
        if section.text:
            items = "".join(f"<li>{html.escape(line)}</li>" for line in section.text)
            parts.append(f"<ul>{items}</ul>")
        if section.paper:
            parts.append(f'<p class="paper">{html.escape(section.paper)}</p>')
        for figure in section.figures:
            data = base64.b64encode(figure.read_bytes()).decode()
            source = f"data:image/png;base64,{data}"
            parts.append(f'<img alt="{html.escape(figure.stem)}" src="{source}">')
        for caption, table in section.tables.items():
            drawn = f'<div class="wide">{_html_table(table)}</div>'
            caption = html.escape(caption)
            if len(table) > OPEN_ROWS:
                parts.append(f"<details><summary>{caption}</summary>{drawn}</details>")
            else:
                parts.append(f"<p><b>{caption}</b></p>{drawn}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_STYLE}</style></head><body>{''.join(parts)}"
        f"<script>{_SORT}</script></body></html>\n"
    )


def _html_table(table: pd.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(str(c).replace('_', ' '))}</th>" for c in table.columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(short(value))}</td>' for value in row)}</tr>"
        for row in table.itertuples(index=False)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def save_table(table: pd.DataFrame, name: str, folder: Path) -> pd.DataFrame:
    """The table, which is kept in a report's folder as a Parquet file too."""
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / "tables" / f"{name}.parquet")
    return table
