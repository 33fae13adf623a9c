"""An answer, piece by piece, while it is generated."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from queue import SimpleQueue
from threading import Event, Thread

import torch
from transformers import StoppingCriteriaList
from transformers.generation import BaseStreamer

UNSETTLED = re.compile(r"[\s\ufffd]+\Z")  # the next token may complete a character; whitespace may end the answer


def answer_text(token_ids: Sequence[int] | torch.Tensor, tokenizer, stops: Collection[int] = ()) -> str:
    """The text of an answer: everything that the model says, special tokens such as `<box>` too, less the token that
    ended it and what pads it behind that one, and, as in training, without whitespace at its ends.

    Args:
        token_ids: (N,), as they were generated.
        stops: ids of the tokens that end an answer.
    """
    return _decoded(token_ids, tokenizer, stops).strip()


def stop_ids(settings: Mapping[str, object]) -> tuple[int, ...]:
    """The tokens that end an answer, of generation arguments, which have one, several or none."""
    ids = settings.get("eos_token_id")
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def _decoded(token_ids: Sequence[int] | torch.Tensor, tokenizer, stops: Collection[int]) -> str:
    ids = token_ids.tolist() if isinstance(token_ids, torch.Tensor) else list(token_ids)
    said = itertools.takewhile(lambda id_: id_ not in stops, ids)
    # transformers asks for the cleaning of spaces where 2.5's tokenizer says so, then warns that it does none
    return tokenizer.decode(list(said), skip_special_tokens=False, clean_up_tokenization_spaces=False)


class AnswerStream(BaseStreamer):
    """Iterator over the pieces of one answer, which is generated in a thread of its own.

    Joined, the pieces are `answer_text` of `token_ids`. What the generation raises is raised to the reader, behind the
    pieces that were made before.

    Args:
        generate: is called with `streamer` and `stopping_criteria`, and generates one answer.
        stopping_criteria: further ones.
        stops: ids of the tokens that end the answer, see `answer_text`.
    """

    def __init__(
        self,
        generate: Callable[..., object],
        tokenizer,
        stopping_criteria: Sequence[Callable] = (),
        stops: Collection[int] = (),
    ):
        self.token_ids: list[int] = []
        """what was generated up to now, the end token included"""
        self._generate = generate
        self._tokenizer = tokenizer
        self._stops = stops
        self._criteria = StoppingCriteriaList([*stopping_criteria, self._asked_to_stop])
        self._sent = 0  # characters
        self._queue: SimpleQueue[str | BaseException | None] = SimpleQueue()
        self._closed = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with new token ids."""
        self.token_ids += value.flatten().tolist()
        text = _decoded(self.token_ids, self._tokenizer, self._stops).lstrip()
        self._send(UNSETTLED.sub("", text))

    def end(self) -> None:
        """Called by `generate` behind the last token; `_run` sees the end, whatever it is."""

    def close(self) -> None:
        """Stop the generation, and wait until it has stopped. What was made can still be read."""
        self._closed.set()
        self._thread.join()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        item = self._queue.get()
        if isinstance(item, str):
            return item
        self._queue.put(None)  # for those who ask again
        if item is None:
            raise StopIteration
        raise item

    def _run(self) -> None:
        try:
            self._generate(streamer=self, stopping_criteria=self._criteria)
            self._send(answer_text(self.token_ids, self._tokenizer, self._stops))
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self._queue.put(text[self._sent :])
            self._sent = len(text)

    def _asked_to_stop(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:  # noqa: ARG002
        """A stopping criterion of transformers: one truth value for each answer."""
        return torch.full((len(input_ids),), self._closed.is_set(), device=input_ids.device)
