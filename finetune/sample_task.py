"""A task that is small and real: drawn pictures, questions about them, held-out pictures to score on.

    python finetune/sample_task.py --output sample_task            # 2400 training and 100 held-out samples
    python finetune/sample_task.py --output sample_task --score MODEL_FOLDER

Every picture shows a coloured shape and a word on a sign, on a speckled ground. One question asks for the colour, one
for the word; each has four possible answers, so guessing scores 0.25. Training samples ask both in random order,
held-out samples one of them. `--score` answers the held-out questions with a model folder (a checkpoint or an adapter)
and prints the part that is right.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # the folder above in the place of this one, where `import evaluate` would find ours
    here = Path(__file__).resolve().parent  # which is not on the path with python -P
    sys.path[:] = [str(here.parent), *(path for path in sys.path if Path(path).resolve() != here)]

import numpy as np
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger("sample_task")

COLOURS = {"red": (214, 48, 49), "green": (39, 155, 76), "blue": (41, 98, 217), "yellow": (245, 200, 25)}
SHAPES = ("circle", "square", "triangle", "diamond")
WORDS = ("P", "WC", "EXIT", "PARKING")
QUESTIONS = {"colour": "What colour is the shape?", "word": "Which word is on the sign?"}


def draw(rng: random.Random, side: int) -> tuple[Image.Image, dict[str, str]]:
    """A picture of `side` x `side` pixels and the answers to its questions."""
    noise = np.random.default_rng(rng.getrandbits(32)).integers(-18, 19, (side, side, 3))
    ground = np.array([rng.randint(190, 235)] * 3)
    image = Image.fromarray(np.clip(ground + noise, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    colour, shape, word = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(WORDS)
    radius = rng.randint(side // 8, side // 5)
    x, y = rng.randint(radius, side - radius), rng.randint(radius, side // 2 - radius // 4)
    corners = {
        "square": [(x + a * radius, y + b * radius) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))],
        "triangle": [(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)],
        "diamond": [(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)],
    }
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
    else:
        pen.polygon(corners[shape], fill=COLOURS[colour])
    font = ImageFont.load_default(size=side * 0.22)
    pen.rectangle((2, side * 0.68, side - 3, side - 3), fill="white")
    middle = (side / 2 + rng.uniform(-2, 2), side * 0.83 + rng.uniform(-2, 2))
    pen.text(middle, word, font=font, fill="black", anchor="mm")
    return image, {"colour": colour, "word": word}


def write_task(output: Path, train: int, held_out: int, side: int, seed: int) -> None:
    """Write `train.json`, `held_out.json` and their pictures.

    Raises:
        ValueError: when the folder is a file or already holds files.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; name a folder, new or empty")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; nothing is overwritten, name another folder")
    (output / "images").mkdir(parents=True)
    rng = random.Random(seed)
    for split, count in (("train", train), ("held_out", held_out)):
        samples = []
        for number in range(count):
            image, answers = draw(rng, side)
            path = f"images/{split}_{number:05d}.png"
            image.save(output / path)
            kinds = rng.sample(list(QUESTIONS), len(QUESTIONS)) if split == "train" else [list(QUESTIONS)[number % 2]]
            turns = []
            for kind in kinds:
                mark = "" if turns else "<image>\n"
                turns.append({"role": "user", "content": mark + QUESTIONS[kind]})
                turns.append({"role": "assistant", "content": answers[kind]})
            samples.append({"id": f"{split}_{number}", "image": path, "conversations": turns})
        (output / f"{split}.json").write_text(json.dumps(samples, indent=1), encoding="utf-8")


def readme_snippet(adapter: Path, picture: Path) -> str:
    """The README's adapter snippet with two paths put in."""
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"<!-- adapter snippet -->\n```python\n(.*?)```", readme, re.S)[1]
    return snippet.replace("path/to/adapter", str(adapter)).replace("path/to/picture.jpg", str(picture))


def score(model_folder: Path, task: Path) -> float:
    """Part of the held-out questions that the model answers exactly, greedily; also per question, in the log.

    An adapter is loaded by the README's snippet, a checkpoint by `load_finetuned`.
    """
    # Imported here: drawing a task needs none of it.
    from tqdm import tqdm

    from finetune.loading import load_finetuned

    if (model_folder / "adapter_config.json").is_file():
        names: dict = {}
        exec(readme_snippet(model_folder, task / "images" / "held_out_00000.png"), names)
        model, tokenizer = names["model"], names["tokenizer"]
    else:
        model, tokenizer = load_finetuned(model_folder)
    right: dict[str, list[bool]] = {}
    for sample in tqdm(json.loads((task / "held_out.json").read_text(encoding="utf-8")), desc="answering"):
        question, answer = (turn["content"] for turn in sample["conversations"])
        with Image.open(task / sample["image"]) as image:
            said = model.chat(
                image,
                [{"role": "user", "content": question}],
                tokenizer,
                sampling=False,
                num_beams=1,
                repetition_penalty=1.0,
                max_new_tokens=8,
            )
        right.setdefault(question.removeprefix("<image>\n"), []).append(said == answer)
    for question, answers in right.items():
        logger.info("%-30s %.2f", question, sum(answers) / len(answers))
    return sum(map(sum, right.values())) / sum(map(len, right.values()))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description="Write the sample task, or score a model on it.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the task")
    parser.add_argument("--train", type=int, default=2400, help="training samples")
    parser.add_argument("--held_out", type=int, default=100, help="held-out samples")
    parser.add_argument("--side", type=int, default=112, help="pixels on each side of a picture")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures and questions")
    parser.add_argument(
        "--score", metavar="MODEL_FOLDER", type=Path, help="score this model instead of writing the task"
    )
    parser.add_argument("--at_least", type=float, default=0.0, help="with --score: exit status 1 below this accuracy")
    arguments = parser.parse_args(argv)
    if arguments.score:
        accuracy = score(arguments.score, arguments.output)
        logger.info("accuracy %.2f", accuracy)
        if accuracy < arguments.at_least:
            parser.exit(1, f"sample_task: expected at least {arguments.at_least}\n")
        return
    try:
        write_task(arguments.output, arguments.train, arguments.held_out, arguments.side, arguments.seed)
    except (OSError, ValueError) as error:
        parser.exit(1, f"sample_task: {error}\n")
    logger.info(
        "wrote %d + %d samples (training, held-out) to %s", arguments.train, arguments.held_out, arguments.output
    )


if __name__ == "__main__":
    main()
