"""The training text of the shipped masks: WikiText-2 without `<unk>`, half of it detokenised.

    .venv/bin/python benchmarks/learning_text.py wiki.train.tokens wiki.valid.raw -o wikitext-mixed.txt
    .venv/bin/python benchmarks/learning_text.py wiki.train.tokens wiki.valid.raw --sentences \\
        --answers benchmarks/texts/answers.jsonl --times 4 -o mixed.jsonl

Masks learn the peculiarities of a text (decision 0010): rare words are `<unk>` in `wiki.train.tokens`, and hyphens
are ` @-@ ` in both files. So paragraphs with `<unk>` are left out, and every second article is detokenised by
lm-evaluation-harness's function. `--sentences` leaves out single sentences instead of paragraphs, which keeps more than
twice as much. `--answers` adds answers of the dense model (dense_answers.py), each `--times` times, shuffled among the
articles; the output is then JSON lines.
"""

import itertools
import json
import random
import re
from pathlib import Path
from typing import Annotated

import typer
from common import console

UNKNOWN = "<unk>"
SENTENCE = re.compile(r".*?(?: \. |$)", re.DOTALL)
"""WikiText's tokenisation has a space on both sides of a full stop."""
TITLE = re.compile(r"^ = [^=].* = $", re.MULTILINE)


def articles(text: str) -> list[str]:
    """The articles of a WikiText file with their titles; text before the first title is dropped."""
    starts = [match.start() for match in TITLE.finditer(text)] + [len(text)]
    return [text[start:end] for start, end in itertools.pairwise(starts)]


def known_words(article: str, sentences: bool = False) -> str:
    """The article without lines that have an unknown word; with `sentences`, without such sentences only."""
    lines = article.splitlines(keepends=True)
    if not sentences:
        return "".join(line for line in lines if UNKNOWN not in line)
    kept = ["".join(one for one in SENTENCE.findall(line) if UNKNOWN not in one) for line in lines]
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in kept if line)


def with_answers(articles: list[str], answers: Path, times: int) -> list[str]:
    """The lines of the articles as JSON lines, the answers shuffled among the articles."""
    documents = [[line if line.strip() else "" for line in article.splitlines(keepends=True)] for article in articles]
    lines = answers.read_text(encoding="utf-8").splitlines()
    documents += [[json.loads(line)["text"]] for line in lines] * times
    random.Random(0).shuffle(documents)
    return [f"{json.dumps({'text': one})}\n" for document in documents for one in document]


def main(
    files: Annotated[list[Path], typer.Argument(help="WikiText files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The text file to write.")],
    sentences: Annotated[bool, typer.Option("--sentences", help="Leave out sentences, not paragraphs.")] = False,
    answers: Annotated[Path | None, typer.Option(help="What dense_answers.py wrote, to add.")] = None,
    times: Annotated[int, typer.Option(help="How often each answer comes.")] = 4,
) -> None:
    """Write the mixed text."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer  # an extra, and slow to import

    texts = [file.read_text(encoding="utf-8") for file in files]
    found = [known_words(article, sentences) for text in texts for article in articles(text)]
    found = [article for article in found if len(article) > 400]  # more than its headings
    mixed = [wikitext_detokenizer({"page": page}) if number % 2 else page for number, page in enumerate(found)]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(with_answers(mixed, answers, times) if answers else mixed), encoding="utf-8")
    console.print(f"{output}: {len(mixed)} articles, {output.stat().st_size:,} bytes", highlight=False)


if __name__ == "__main__":
    typer.run(main)
