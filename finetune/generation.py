"""Answers to the questions of a data set, in batches padded on the left: for evaluate.py, and while training.

Every answer in the data with a weight other than 0 is a question of its own. What stands before it, the answers of
earlier turns included, is the prompt: a wrong answer does not spoil the next question. Shapes: B questions of a batch,
L tokens of the longest prompt.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from finetune.checks import Problem, Remarks, decode_pictures, scan
from finetune.dataset import SupervisedDataset
from finetune.errors import UserError, is_main_of_node, over_processes, processes, rank
from finetune.loaders import Lifeline, Load, sample_bytes
from finetune.metrics import Scores, mean_scores, score
from finetune.minicpmv.image_slicing import slicing_of
from finetune.minicpmv.streaming import answer_text, stop_ids
from finetune.waiting import Taken, take_reported

logger = logging.getLogger("finetune")

# Said in full, so that nothing in a checkpoint's generation_config.json gets into it.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
}


class Question(NamedTuple):
    """An answer of the data that the model shall give itself."""

    index: int
    """of the sample in the data set"""
    turn: int
    """of the answer in the conversation, from 0"""
    tokens: int
    """of the prompt, pictures included"""


class Answer(NamedTuple):
    """What the model said."""

    text: str
    cut: bool
    """the most new tokens were reached before an end token"""


class Answered(NamedTuple):
    """An answer beside what it is compared with."""

    question: str
    answer: Answer
    reference: str
    scores: Scores


def find_questions(
    dataset: SupervisedDataset, indices: Sequence[int] | None = None, decode: bool = False, workers: int | None = None
) -> tuple[list[Question], list[Problem]]:
    """All questions in the order of the data, and the samples that cannot be used; the same in every process. What
    there is to remark is then known as `dataset.gathered`.

    Args:
        indices: samples to look at; None: all.
        decode: also decode every picture.
        workers: processes; None: this process's share of the cores.
    """
    indices = range(len(dataset)) if indices is None else indices
    found = scan(len(indices), partial(_look, dataset, indices, decode), "looking at the samples", workers)
    questions = [question for of_nodes in found for question in of_nodes[0][0]]
    problems = {problem.index: problem for of_nodes in found for _, bad, _ in of_nodes for problem in bad}
    dataset.gathered = Remarks.of(of_nodes[0][2] for of_nodes in found)
    questions = [question for question in questions if question.index not in problems]
    return questions, [problems[index] for index in sorted(problems)]


def _look(
    dataset: SupervisedDataset, indices: Sequence[int], decode: bool, places: range
) -> tuple[list[Question], list[Problem], Remarks]:
    questions, problems, remarks = [], [], Remarks()
    for index in (int(indices[place]) for place in places):
        remarks.see(dataset, index)
        try:
            asked = dataset.prompts(index)
            if not asked:
                raise ValueError("every answer has weight 0; there is none to compare with")
            if decode:
                decode_pictures(dataset, index)
            questions += [Question(index, *prompt) for prompt in asked]
        except ValueError as error:
            problems.append(Problem(index, *dataset.place(index), str(error)))
    return questions, problems, remarks


def deal(questions: Sequence[Question], batch_size: int, rank: int = 0, processes: int = 1) -> list[list[int]]:
    """Batches of one process: places in `questions`, prompts of about the same length together, the longest first.

    Every process gets the same number of batches, which is what ZeRO-3 needs; where they do not come out even, some
    are given to two processes.
    """
    places = sorted(range(len(questions)), key=lambda place: -questions[place].tokens)
    size = max(min(batch_size, -(-len(places) // processes)), 1)
    batches = [places[start : start + size] for start in range(0, len(places), size)]
    rounds = -(-len(batches) // processes)
    return [batches[(turn * processes + rank) % len(batches)] for turn in range(rounds)]


def prompt_collator(items: Sequence[Mapping], padding_value: int) -> dict:
    """Batch prompts, padded on the left.

    Args:
        items: of `SupervisedDataset.prompt`.
        padding_value: token id of padding, which nothing sees.

    Returns:
        `data` for `MiniCPMV.generate`: `input_ids` (B, L) int64, `attention_mask` (B, L) bool; `pixel_values`,
        `tgt_sizes` and `image_bound`, moved with the padding, as lists per question; `independent_samples`; `bad`, as
        of `data_collator`.
    """
    longest = max(len(item["input_ids"]) for item in items)
    input_ids = torch.full((len(items), longest), padding_value)
    attention_mask = torch.zeros(len(items), longest, dtype=torch.bool)
    bounds = []
    for row, item in enumerate(items):
        padding = longest - len(item["input_ids"])
        input_ids[row, padding:] = item["input_ids"]
        attention_mask[row, padding:] = True
        bounds.append(item["image_bound"] + padding)
    bad = [item["bad"] for item in items if "bad" in item]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": [item["pixel_values"] for item in items],
        "tgt_sizes": [item["tgt_sizes"] for item in items],
        "image_bound": bounds,
        "independent_samples": True,
        **({"bad": bad} if bad else {}),
    }


def generate_answers(
    model: nn.Module,
    dataset: SupervisedDataset,
    questions: Sequence[Question],
    batches: Sequence[Sequence[int]],
    workers: int = 0,
    fetch: Callable[[Callable[[], list]], list] = take_reported,
    **settings,
) -> Iterator[dict[int, Answer]]:
    """The answers of one batch after another, by their places in `questions`; none to questions of masked samples.

    Args:
        model: `MiniCPMV`, plain or under PEFT; it is in evaluation mode meanwhile. Under ZeRO-3 all processes must
            have the same number of batches.
        batches: of `deal`.
        workers: processes that load and slice pictures while the model generates.
        fetch: takes a batch from the loader, see `Taken`.
        settings: generation arguments of transformers that win over greedy search, `max_new_tokens` among them.
    """
    tokenizer = dataset.tokenizer
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    settings = base.chat_settings(tokenizer, **{**GREEDY, "use_cache": True, **settings})
    stops = stop_ids(settings)
    device = base.get_input_embeddings().weight.device
    loader = DataLoader(
        _Prompts(dataset, questions),
        batch_sampler=batches,
        collate_fn=partial(prompt_collator, padding_value=tokenizer.eos_token_id),
        num_workers=min(workers, len(batches)),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the loader's own draw is not to change what training draws
    )
    with closing(Lifeline()) as lifeline, _evaluating(model):
        lifeline.give_to(loader)
        for places, data in zip(batches, Taken(loader, fetch), strict=True):
            bad = {problem.index for problem in data.pop("bad", ())}
            data = {
                name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for name, value in data.items()
            }
            said = base.generate(data=data, **settings).cpu()
            cut = ~torch.isin(said, torch.tensor(stops)).any(dim=1)
            texts = [answer_text(row, tokenizer, stops) for row in said]
            answers = zip(places, map(Answer, texts, cut.tolist()), strict=True)
            yield {place: answer for place, answer in answers if questions[place].index not in bad}


def load_of(dataset: SupervisedDataset, questions: Sequence[Question], batch_size: int) -> Load:
    """What the loader of `generate_answers` brings."""
    tokens = np.array([question.tokens for question in questions])
    slicing = slicing_of(dataset.slice_config, dataset.patch_size)
    pixels = slicing["scale_resolution"], slicing["patch_size"]
    return Load(sample_bytes(tokens // dataset.query_nums, tokens, *pixels), batch_size, kept=1)


class _Prompts(Dataset):
    def __init__(self, dataset: SupervisedDataset, questions: Sequence[Question]):
        self.dataset, self.questions = dataset, questions

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, place: int) -> dict:
        question = self.questions[place]
        return self.dataset.prompt(question.index, question.turn)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which neither dropout nor gradient checkpointing runs; then the mode it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def compare(dataset: SupervisedDataset, question: Question, answer: Answer) -> Answered:
    """The answer beside the data's own."""
    turns = dataset.sample(question.index)["conversations"]
    reference = turns[question.turn]["content"].strip()
    asked = turns[question.turn - 1]["content"].strip()
    return Answered(asked, answer, reference, score(answer.text, reference))


class Predictor:
    """A fixed part of a data set that is answered anew at every evaluation of a training run.

    Args:
        dataset: its `max_length` leaves out questions whose prompt is as long, since training cuts their answers off.
        samples: how many, evenly spread over the data set; all processes must make it at the same time.
        batch_size: questions per process at once.
        max_new_tokens: longest answer.
        workers: loader processes.

    Attributes:
        questions: all that are asked.
        left_out: how many are not, for their length.

    Raises:
        UserError: when no question is left.
    """

    def __init__(
        self, dataset: SupervisedDataset, samples: int, batch_size: int, max_new_tokens: int, workers: int = 0
    ):
        count = min(samples, len(dataset))
        spread = [place * len(dataset) // count for place in range(count)]
        found, _ = find_questions(dataset, spread)  # samples with a problem are the loss's to report
        whole = dataset.max_positions or sys.maxsize
        limit = min(dataset.max_length or sys.maxsize, whole)
        self.questions = [question for question in found if question.tokens < limit]
        self.left_out = len(found) - len(self.questions)
        self.dataset, self.batch_size, self.workers = dataset, batch_size, workers
        if not self.questions:
            raise UserError(
                f"--predict_with_generate true: the {count} samples to answer hold no question; look at their answers' "
                "weights and at --model_max_length"
            )
        room = whole - max(question.tokens for question in self.questions)
        self.max_new_tokens = min(max_new_tokens, room)
        if room < max_new_tokens and is_main_of_node():
            logger.warning(
                "answers in evaluations can have %d tokens in place of --predict_max_new_tokens %d: with the longest "
                "prompt the model takes %d",
                *(room, max_new_tokens, whole),
            )

    def __call__(
        self,
        model: nn.Module,
        show_progress: bool = False,
        fetch: Callable[[Callable[[], list]], list] = take_reported,
    ) -> list[Answered]:
        """All questions answered by all processes together, in the order of the data, the same in each of them; those
        of masked samples are left out.

        Args:
            fetch: see `generate_answers`.
        """
        batches = deal(self.questions, self.batch_size, rank(), processes())
        said = generate_answers(
            model, self.dataset, self.questions, batches, self.workers, fetch, max_new_tokens=self.max_new_tokens
        )
        bar = tqdm(said, "answering", len(batches), unit=" batches", disable=not show_progress, leave=False)
        own = dict(chain.from_iterable(answers.items() for answers in bar))
        answers = {place: answer for of_process in over_processes(own) for place, answer in of_process.items()}
        return [
            compare(self.dataset, question, answers[n]) for n, question in enumerate(self.questions) if n in answers
        ]


def metrics_of(answered: Sequence[Answered]) -> dict[str, float]:
    """Mean of each metric, by its name."""
    return mean_scores([one.scores for one in answered])
