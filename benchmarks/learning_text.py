"""The text that the shipped masks learn from: WikiText-2 without its `<unk>`, half of it without its spaces.

    .venv/bin/python benchmarks/learning_text.py wiki.train.tokens wiki.valid.raw -o wikitext-mixed.txt

Masks learn the habits of a text (decision 0010): of `wiki.train.tokens` that rare words are `<unk>`, of both files
that a hyphen is ` @-@ `. So paragraphs with `<unk>` are left out, and in every second article WikiText's tokenisation
is undone (lm-evaluation-harness's function for it).
"""

import itertools
import re
from pathlib import Path
from typing import Annotated

import typer
from common import console

TITLE = re.compile(r"^ = [^=].* = $", re.MULTILINE)


def articles(text: str) -> list[str]:
    """The articles of a WikiText file, titles included; what stands before the first title is none."""
    starts = [match.start() for match in TITLE.finditer(text)] + [len(text)]
    return [text[start:end] for start, end in itertools.pairwise(starts)]


def known_words(article: str) -> str:
    """The article without the lines that have an unknown word."""
    return "".join(line for line in article.splitlines(keepends=True) if "<unk>" not in line)


def main(
    files: Annotated[list[Path], typer.Argument(help="WikiText files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The text file to write.")],
) -> None:
    """Write the mixed text."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer  # an extra, and slow to import

    found = [known_words(article) for file in files for article in articles(file.read_text(encoding="utf-8"))]
    found = [article for article in found if len(article) > 400]  # more than its headings
    mixed = [wikitext_detokenizer({"page": page}) if number % 2 else page for number, page in enumerate(found)]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(mixed), encoding="utf-8")
    console.print(f"{output}: {len(mixed)} articles, {output.stat().st_size:,} bytes", highlight=False)


if __name__ == "__main__":
    typer.run(main)
