"""The second training text of the shipped masks: answers of the dense model to a few hundred questions.

    .venv/bin/dispc compile MODEL --dense --target onnx-cpu --quantize int8 -o dense-int8
    .venv/bin/python benchmarks/dense_answers.py dense-int8 -o benchmarks/texts/answers.jsonl

Masks learned on an encyclopaedia forget how to answer. Questions are drawn with a seed from the lists below, and
answers sampled from the model in batches; every tenth prompt is the opening of a plain text instead. A line is {"text":
prompt and answer as the chat template writes them}. The last `--held-out` prompts go into a second file
*-held-out.jsonl. A second run continues after the lines that are there.
"""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import console

from dispc.model.tokenizer import load_tokenizer
from dispc.runtime.generate import Sampler
from dispc.runtime.session import Artifact

QUESTIONS = (
    "What is {}?",
    "Why is {} important?",
    "Explain {} to a child.",
    "How does {} work?",
    "Tell me about {}.",
    "Give me three facts about {}.",
    "What should a beginner know about {}?",
    "Write a short paragraph about {}.",
    "What are the advantages and disadvantages of {}?",
    "Describe the history of {} in a few sentences.",
    "Write a short story about {}.",
    "Write four lines of poetry about {}.",
    "What do people get wrong about {}?",
    "Summarise {} in two sentences.",
    "How has {} changed in the last hundred years?",
    "Who should learn about {}?",
    "I have to give a talk about {}. How do I begin?",
    "What is a common question about {}, and its answer?",
    "List five words that have to do with {} and explain each.",
    "Compare {} with something similar.",
)
OPENINGS = (
    "The most surprising thing about {} is",
    "Last summer I began to read about {}, and",
    "In the news today: {}",
    "Few people remember how {}",
    "A letter to a friend about {}:\n\nDear Anna,",
)
TOPICS = """
photosynthesis, the moon, volcanoes, bread, the bicycle, gravity, whales, the printing press, rain, chess, honey
bees, the Roman Empire, electric cars, sleep, vaccines, coffee, the alphabet, jazz, the human heart, glaciers,
computers, money, the Olympic Games, dinosaurs, rivers, tea, salt, democracy, the violin, rice farming, bridges,
sharks, the solar system, lightning, paper, gardens, mathematics, cheese, the Silk Road, dreams, trains, the French
Revolution, mushrooms, recycling, football, the internet, deserts, maps, friendship, antibiotics, ships, the Great
Wall of China, penguins, time zones, wind power, libraries, cancer, the Renaissance, soap, earthquakes, wolves,
programming in Python, stress at work, learning a language, saving money, cooking pasta, job interviews, a healthy
breakfast, running a marathon, planting tomatoes, buying a used car, writing an email, teamwork, public speaking,
the weather forecast, washing clothes, travelling by train, Shakespeare, black holes, atoms, evolution, the water
cycle, prime numbers, the stock market, climate change
"""


def prompts(count: int, seed: int) -> list[tuple[str, bool]]:
    """Prompts without repetition, each with whether it is a question (or an opening)."""
    draw = random.Random(seed)
    topics = " ".join(TOPICS.split()).split(", ")
    questions = draw.sample([one.format(topic) for one in QUESTIONS for topic in topics], count)
    openings = itertools.cycle(draw.sample([one.format(topic) for one in OPENINGS for topic in topics], count // 10))
    return [(next(openings), False) if number % 10 == 9 else (one, True) for number, one in enumerate(questions)]


def chat(tokenizer: Any, question: str) -> str:
    """The question as the chat template puts it, up to where the answer begins."""
    turns = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def answers(artifact: Artifact, ids: Sequence[Sequence[int]], samplers: list[Sampler], limit: int) -> list[list[int]]:
    """New tokens of each row, up to a stop token or `limit`; the output of rows that have stopped is dropped."""
    logits, state = artifact.prefill(ids)
    found: list[list[int]] = [[] for _ in ids]
    done = [False for _ in ids]
    for step in range(limit):
        chosen = [sampler.choose(row, step) for sampler, row in zip(samplers, logits, strict=True)]
        done = [over or token in artifact.stop_tokens for over, token in zip(done, chosen, strict=True)]
        for row, over, token in zip(found, done, chosen, strict=True):
            row.extend([] if over else [token])
        if all(done):
            break
        logits, state = artifact.step(np.array(chosen), state)
    return found


def main(
    artifact: Annotated[Path, typer.Argument(help="Dense artifact.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON lines.")],
    count: Annotated[int, typer.Option(help="Prompts.")] = 400,
    held_out: Annotated[int, typer.Option(help="The last so many go into a file of their own.")] = 48,
    tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Of sampling.")] = 0.95,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 16,
    seed: Annotated[int, typer.Option(help="Of questions and answers.")] = 0,
) -> None:
    """Sample the answers and write both files."""
    model, tokenizer = Artifact(artifact), load_tokenizer(artifact)
    files = (output, output.with_name(f"{output.stem}-held-out.jsonl"))
    output.parent.mkdir(parents=True, exist_ok=True)
    written = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files if file.exists())
    chosen = list(enumerate(prompts(count, seed)))[written:]
    for start in range(0, len(chosen), batch):
        rows = chosen[start : start + batch]
        texts = [chat(tokenizer, text) if question else text for _, (text, question) in rows]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        samplers = [Sampler(temperature, top_p, seed * count + number) for number, _ in rows]
        for (number, (_, question)), text, found in zip(
            rows, texts, answers(model, ids, samplers, tokens), strict=True
        ):
            whole = text + tokenizer.decode(found, clean_up_tokenization_spaces=False)
            whole += "<|im_end|>\n" if question and len(found) < tokens else ""
            with open(files[number >= count - held_out], "a", encoding="utf-8") as file:
                file.write(json.dumps({"text": whole}) + "\n")
        console.print(f"{rows[-1][0] + 1} of {count}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
