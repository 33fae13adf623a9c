"""One self-contained page that shows what the model sees of training data: slices, tokens, what is learned.

`inspect_data.py --report` writes it. The page needs no network, no other file and no JavaScript, and its content
security policy allows none, whatever the data say. Pictures are the item's own pixels; every token is a span.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

from finetune.errors import shown
from finetune.minicpmv.conversation import IGNORE_INDEX, MINICPM_ROLES
from finetune.page import data_uri, panel, shown_text, tiles, write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PROBLEMS = 50  # rows in the table
MAX_JUMPS = 40  # links to the answers of a sample
OVERVIEW_BOX, SLICES_BOX, ALONE_BOX = (180, 300), (340, 400), (420, 420)  # pixels on the page that pictures fit into
COLOURS = {"picture": "#7fb2ea", "text": "#b9bfc8", "learned": "#3fa45b"}
MARKED = {"recommended": "recommended_model_max_length", "chosen": "model_max_length"}
SPREAD = {"min": "min", "median": "median", "p95": "95 %", "p99": "99 %", "max": "max"}


@dataclass
class Card:
    """A sample to show."""

    reasons: list[str]
    """why it is shown: "first samples", "longest", "most slices", "truncated", "nothing supervised" """
    name: str
    item: dict
    """of `SupervisedDataset` with `transform=None`, not truncated"""
    grids: list[tuple[int, int] | None]
    """of each picture in reading order: (columns, rows) of its slices, None for the overview alone"""
    kept: int
    """tokens that truncation leaves; 0 when the sample would lose its whole answer and be refused"""


class Slice(NamedTuple):
    """A slice of a sample: its place among the pictures and its pixels."""

    number: int
    picture: int
    place: str
    """`overview`, or row and column"""
    pixels: torch.Tensor
    """uint8 (3, H, W)"""
    patches: tuple[int, int]
    """high, wide"""
    begin: int
    """first token; `end` is exclusive"""
    end: int


class Span(NamedTuple):
    """A piece of the token stream: one token, the tokens of one character, the tokens of a slice, or a ghost."""

    text: str
    begin: int
    end: int
    """exclusive; equal to `begin` for a ghost, which is predicted there and not in the input"""
    kind: str
    """`text`, `special`, `picture` or `ghost`"""
    learned: bool
    cut: bool
    ids: tuple[int, ...]


def write_report(
    path: Path,
    tokenizer,
    llm_type: str,
    summary: dict,
    lengths: dict[str, np.ndarray],
    slices: np.ndarray,
    cards: list[Card],
) -> None:
    """Write the page; the same data give the same page.

    Args:
        path: of the HTML file; it is written aside and put there when whole.
        tokenizer: that made the cards' items.
        llm_type: `llama3` or `minicpm`.
        summary: counts, spreads and problems of the whole data, as `inspect_data.py` prints them.
        lengths: tokens of every usable sample: `total`, `text`, `picture`.
        slices: slices of every picture, the overview counted.
        cards: samples to show.
    """
    vocabulary = Vocabulary(tokenizer, llm_type)
    limit = summary["model_max_length"]
    body = [
        _head(summary),
        _numbers(summary, lengths, slices),
        _problems(summary["problems"]),
        _contents(cards),
        *(_card(number, card, vocabulary, limit) for number, card in enumerate(cards, 1)),
    ]
    colours = "".join(f"--{name}: {value}; " for name, value in COLOURS.items())
    write_page(path, "What the model sees of your training data", f":root {{ {colours}}}{STYLE}", "\n".join(body))


class Vocabulary:
    """What single tokens stand for, exactly: `tokenizer.decode` drops spaces and replaces halves of characters."""

    def __init__(self, tokenizer, llm_type: str):
        self.tokenizer = tokenizer
        self.bytes_of_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}
        self.byte_level = llm_type == "llama3"
        names = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items()}
        roles = {} if self.byte_level else {word: role for role, word in MINICPM_ROLES.items()}
        names.update((word, tokenizer.convert_tokens_to_ids(word)) for word in roles)
        self.whole = {id_: name for name, id_ in names.items()}
        # 2.5 pads with "!", which is an ordinary word of its texts all the same.
        self.special = {id_ for name, id_ in names.items() if len(name) > 1}
        self.roles = {names[word]: role for word, role in roles.items()}
        self.header_begin, self.header_end = names.get("<|start_header_id|>"), names.get("<|end_header_id|>")

    def bytes_of(self, id_: int) -> bytes:
        """UTF-8 of a token's text, which may begin or end inside a character."""
        if id_ in self.whole:
            return self.whole[id_].encode()
        token = self.tokenizer.convert_ids_to_tokens(id_)
        if self.byte_level:
            return bytes(map(self.bytes_of_letter.__getitem__, token))
        if len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()  # sentencepiece's sign for a space

    def role_of(self, turn: Sequence[Span]) -> str:
        """The role that a turn's first tokens name."""
        first = turn[0].ids[0]
        if first != self.header_begin:
            return self.roles.get(first, "start")
        ids = [span.ids[0] for span in turn]
        end = ids.index(self.header_end) if self.header_end in ids else 2
        return "".join(span.text for span in turn[1:end]).strip()

    def begins_turn(self, span: Span) -> bool:
        return span.end > span.begin and (span.ids[0] in self.roles or span.ids[0] == self.header_begin)


def _slices(card: Card) -> list[Slice]:
    places = []
    for picture, grid in enumerate(card.grids, 1):
        columns, rows = grid or (0, 0)
        places.append((picture, "overview"))
        places += [(picture, f"row {r + 1}, column {c + 1}") for r in range(rows) for c in range(columns)]
    item = card.item
    bounds = item["image_bound"].view(-1, 2).tolist()
    sizes = map(tuple, item["tgt_sizes"].view(-1, 2).tolist())
    return [
        Slice(number, *place, pixels, patches, *bound)
        for number, (place, pixels, patches, bound) in enumerate(
            zip(places, item["pixel_values"], sizes, bounds, strict=True)
        )
    ]


def _spans(card: Card, slices: Sequence[Slice], vocabulary: Vocabulary) -> Iterator[Span]:
    """The token stream in order, ghosts where they are predicted."""
    ids, labels = card.item["input_ids"].tolist(), card.item["labels"].tolist()
    picture_at = {one.begin: one for one in slices}

    def goes_on(raw: bytes, end: int) -> bool:
        """Whether a character is unfinished and the next token may finish it."""
        return (
            _unfinished(raw)
            and end not in (len(ids), card.kept)
            and ids[end] not in vocabulary.special
            and end not in picture_at
        )

    begin = 0
    while begin < len(ids):
        end, learned = begin + 1, begin > 0 and labels[begin - 1] == ids[begin]
        if begin in picture_at:
            one = picture_at[begin]
            end = one.end
            text, kind = f"picture {one.picture} · {one.place} · {end - begin} tokens", "picture"
        else:
            raw = vocabulary.bytes_of(ids[begin])
            kind = "special" if ids[begin] in vocabulary.special else "text"
            while goes_on(raw, end):
                raw += vocabulary.bytes_of(ids[end])
                end += 1
            text = raw.decode(errors="backslashreplace")
        yield Span(text, begin, end, kind, learned, begin >= card.kept, tuple(ids[begin:end]))
        # Where the input is cut, its last token still predicts the first that is gone.
        asked = labels[end - 1]
        if asked != IGNORE_INDEX and (end in (len(ids), card.kept) or asked != ids[end]):
            text = vocabulary.bytes_of(asked).decode(errors="backslashreplace")
            yield Span(text, end, end, "ghost", True, end > card.kept, (asked,))
        begin = end


def _unfinished(raw: bytes) -> bool:
    """Whether the text breaks off inside a character."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def _turns(spans: Sequence[Span], vocabulary: Vocabulary) -> list[list[Span]]:
    turns: list[list[Span]] = []
    for span in spans:
        if not turns or vocabulary.begins_turn(span):
            turns.append([])
        turns[-1].append(span)
    return turns


def _token(span: Span, anchor: str) -> str:
    """A span of the stream; the signs for newlines come from the style sheet, so that copied text is the data's."""
    learned, cut = " learned" * span.learned, " cut" * span.cut
    if span.kind == "picture":
        title = f"positions {span.begin} to {span.end - 1}, id {span.ids[0]} each; click to see the slice"
        return f'<a class="t picture{cut}" href="#{anchor}" title="{title}">{shown_text(span.text)}</a>'
    ids = ", ".join(map(str, span.ids))
    if span.kind == "ghost":
        title = f"id {ids}, predicted at position {span.begin - 1}, not in the input"
    elif len(span.ids) == 1:
        title = f"id {ids}, position {span.begin}"
    else:
        title = f"ids {ids}, positions {span.begin} to {span.end - 1}: a character is split over them"
    blank = " blank" * (span.text.strip(" ") == "")
    text = shown_text(span.text).replace("\n", '<i class="nl"></i>\n').replace("\t", '<i class="tab"></i>\t')
    return f'<span class="t {span.kind}{learned}{cut}{blank}" title="{title}">{text}</span>'


def _turn(number: int, turn: Sequence[Span], role: str, prefix: str, slices: Sequence[Slice], notes: dict) -> str:
    """A turn's block; `notes` has HTML to put in front of a position."""
    tokens = sum(span.end - span.begin for span in turn)
    learned = sum(max(span.end - span.begin, 1) for span in turn if span.learned and not span.cut)
    slice_at = {one.begin: one.number for one in slices}
    count = f"{tokens:,} tokens" if tokens != 1 else "1 token"
    said = f'<span class="learned">{learned:,} learned</span>' if learned else ""
    if role == "assistant" and not learned:
        said = "<span>not learned</span>"
    stream = []
    for span in turn:
        if span.kind != "ghost" and span.begin in notes:
            stream.append(notes[span.begin])
        stream.append(_token(span, f"{prefix}slice{slice_at.get(span.begin)}"))
    return (
        f'<div class="turn{" taught" * bool(learned)}" id="{prefix}turn{number}">'
        f'<div class="role"><b>{shown_text(role[:40])}</b><span>{count}</span>{said}</div>'
        f'<div class="tokens">{"".join(stream)}</div></div>'
    )


def _stream(
    card: Card,
    spans: Sequence[Span],
    slices: Sequence[Slice],
    vocabulary: Vocabulary,
    limit: int | None,
    prefix: str,
) -> str:
    """The turns in a box of limited height, under links to the answers."""
    length = len(card.item["input_ids"])
    flag = f"--model_max_length {limit}" if limit else "--model_max_length"
    notes = {}
    if card.kept == 0:
        lost = any(span.learned for span in spans)
        cause = f"at {flag} this sample would lose its whole answer" if lost else "there is nothing to learn"
        notes[0] = f'<div class="cutline" id="{prefix}cut">refused: {cause}</div>'
    elif card.kept < length:
        gone = length - card.kept
        cause = f"cut here: {flag} · the {gone:,} tokens below are not seen"
        notes[card.kept] = f'<div class="cutline" id="{prefix}cut">{cause}</div>'
    turns = _turns(spans, vocabulary)
    blocks = [
        notes.pop(turn[0].begin, "") + _turn(n, turn, vocabulary.role_of(turn), prefix, slices, notes)
        for n, turn in enumerate(turns, 1)
    ]
    taught = [n for n, turn in enumerate(turns, 1) if any(span.learned for span in turn)]
    jumps = [f'<a href="#{prefix}turn{n}">answer {k}</a>' for k, n in enumerate(taught[:MAX_JUMPS], 1)]
    if 0 < card.kept < length:
        jumps.append(f'<a href="#{prefix}cut">where it is cut</a>')
    line = f"Go to: {' · '.join(jumps)}" if jumps else '<span class="bad">Nothing here is learned.</span>'
    refused = " refused" * (card.kept == 0)
    return f'<p class="jumps">{line}</p><div class="stream{refused}" tabindex="0">{"".join(blocks)}</div>'


def _strip(card: Card, spans: Sequence[Span]) -> str:
    """The whole sample as one bar, in reading order."""
    bars = []
    for (kind, cut), run in groupby(
        (span for span in spans if span.kind != "ghost"),
        key=lambda span: ("picture" if span.kind == "picture" else "learned" if span.learned else "text", span.cut),
    ):
        spans_of_run = list(run)
        begin, end = spans_of_run[0].begin, spans_of_run[-1].end
        name = {"picture": "picture", "learned": "learned", "text": "not learned"}[kind] + ", cut off" * cut
        bars.append(
            f'<rect class="{kind}{" cut" * cut}" x="{begin}" width="{end - begin}" height="1">'
            f"<title>{name}: tokens {begin} to {end - 1}</title></rect>"
        )
    length = len(card.item["input_ids"])
    return f'<svg class="strip" viewBox="0 0 {length} 1" preserveAspectRatio="none" role="img">{"".join(bars)}</svg>'


def _figure(one: Slice, prefix: str, kept: int) -> str:
    buffer = io.BytesIO()
    image = Image.fromarray(one.pixels.permute(1, 2, 0).contiguous().numpy())
    image.save(buffer, "JPEG", quality=90, subsampling=0)
    high, wide = one.patches
    gone = one.end > kept
    title = (
        f"{one.place}: {image.width} × {image.height} pixels, {wide} × {high} patches, "
        f"tokens {one.begin} to {one.end - 1}{', cut off' * gone}"
    )
    return (
        f'<img id="{prefix}slice{one.number}"{" class=cut" * gone} alt="{one.place}" title="{title}" '
        f'width="{image.width}" height="{image.height}" src="{data_uri("jpeg", buffer.getvalue())}">'
    )


def _fit(size: tuple[int, int], box: tuple[int, int]) -> str:
    """Widths as style variables: fitted into a box, and pixel for pixel."""
    scale = min(box[0] / size[0], box[1] / size[1], 1)
    # A sliver of a picture would be lost to the eye, hence the least width.
    return f"--fit:{max(size[0] * scale, 24):.0f}px;--full:{size[0]}px"


def _picture(slices: Sequence[Slice], grid: tuple[int, int] | None, prefix: str, kept: int) -> str:
    """One picture: its overview, and beside it the slices as they were cut."""
    overview, *cells = slices
    figures = [_figure(one, prefix, kept) for one in slices]
    high, wide = overview.patches
    size = tuple(overview.pixels.shape[:0:-1])
    box = OVERVIEW_BOX if cells else ALONE_BOX
    parts = [f'<div class="grid" style="{_fit(size, box)};--columns:1">{figures[0]}</div>']
    caption = f"overview {size[0]} × {size[1]} pixels ({wide} × {high} patches)"
    if grid:
        (columns, rows), (height, width) = grid, cells[0].pixels.shape[1:]
        high, wide = cells[0].patches
        style = f"{_fit((columns * width, rows * height), SLICES_BOX)};--columns:{columns}"
        parts.append(f'<div class="grid" style="{style}">{"".join(figures[1:])}</div>')
        caption += f", then {columns} × {rows} slices of {width} × {height} pixels ({wide} × {high} patches)"
    query_num = overview.end - overview.begin
    caption += f" · {len(slices)} × {query_num} = {len(slices) * query_num:,} tokens"
    gone = sum(one.end > kept for one in slices) if kept else 0
    note = f' · <b class="bad">{gone} of {len(slices)} cut off</b>' if gone else ""
    return (
        f'<div class="picture"><label><input type="checkbox" class="zoom">pixel for pixel</label>'
        f'<h4>picture {overview.picture}</h4><div class="parts">{"".join(parts)}</div>'
        f"<p>{caption}{note}</p></div>"
    )


def _card(number: int, card: Card, vocabulary: Vocabulary, limit: int | None) -> str:
    prefix = f"sample{number}-"
    slices = _slices(card)
    spans = list(_spans(card, slices, vocabulary))
    labels = card.item["labels"]
    length, supervised = len(labels), int((labels != IGNORE_INDEX).sum())
    kept_supervised = int((labels[: card.kept] != IGNORE_INDEX).sum())
    picture = sum(one.end - one.begin for one in slices)
    learned = f"{kept_supervised:,} of {supervised:,}" if kept_supervised < supervised else f"{supervised:,}"
    kept = "all kept" if card.kept == length else f"{card.kept:,} kept" if card.kept else "refused"
    facts = [
        f"<b>{length:,}</b> tokens",
        f'<i class="key picture"></i><b>{picture:,}</b> picture',
        f'<i class="key text"></i><b>{length - picture:,}</b> text',
        f'<span class="{"" if kept_supervised else "bad"}"><i class="key learned"></i><b>{learned}</b> learned</span>',
        f'<span class="{"" if card.kept == length else "bad"}">{kept}</span>',
    ]
    pictures = [
        _picture(list(group), card.grids[n - 1], prefix, card.kept)
        for n, group in groupby(slices, key=lambda one: one.picture)
    ]
    left = f'<div class="pictures">{"".join(pictures)}</div>' if pictures else ""
    return (
        f'<section class="card" id="sample{number}"><h3>{shown_text(card.name)} {_badges(card)}</h3>'
        f'<p class="facts">{"".join(f"<span>{fact}</span>" for fact in facts)}</p>{_strip(card, spans)}'
        f'<div class="columns{" alone" * (not pictures)}">{left}'
        f"<div>{_stream(card, spans, slices, vocabulary, limit, prefix)}</div></div></section>"
    )


def _badges(card: Card) -> str:
    alarming = ("truncated", "nothing supervised")
    return " ".join(
        f'<span class="badge{" alarm" * (reason in alarming)}">{shown_text(reason)}</span>' for reason in card.reasons
    )


def _head(summary: dict) -> str:
    spread, recommended = summary["tokens"]["total"], summary["recommended_model_max_length"]
    problems = len(summary["problems"])
    numbers = [
        ("samples", f"{summary['samples']:,}", ""),
        ("with pictures", f"{summary['with_pictures']:,}", ""),
        ("text only", f"{summary['text_only']:,}", ""),
        ("problems", f"{problems:,}", "alarm" if problems else "good"),
        ("tokens in the longest sample", f"{spread['max']:,}" if spread else "–", ""),
        ("recommended", f"<code>--model_max_length {recommended}</code>" if recommended else "–", "flag"),
    ]
    limit = summary["model_max_length"]
    facts = [
        shown_text(summary["model"]),
        f"{summary['query_num']} tokens a slice",
        f"at most {summary['max_slice_nums']} slices a picture beside its overview",
        f"judged by --model_max_length {limit}" if limit else "no --model_max_length given",
    ]
    files = "".join(f"<li><code>{shown_text(file)}</code></li>" for file in summary["files"])
    too_long = summary.get("longer_than_the_model_allows")
    warning = f'<p class="bad">Samples longer than the model allows: {too_long:,}</p>' if too_long else ""
    if unsupervised := summary["nothing_supervised"]:
        cause = "nothing to learn, or nothing left of it where they are cut" if limit else "nothing to learn"
        warning += f'<p class="bad">Samples that training would refuse: {unsupervised:,} ({cause})</p>'
    return (
        f"<header><h1>What the model sees of your training data</h1><p>{' · '.join(facts)}</p>"
        f'<ul class="files">{files}</ul></header>{tiles(numbers)}{warning}'
    )


def _numbers(summary: dict, lengths: dict[str, np.ndarray], slices: np.ndarray) -> str:
    """Plots and tables of the whole data."""
    if not len(lengths["total"]):
        return panel("Tokens of a sample", "<p>No sample can be used.</p>")
    plots = _plot(lambda axes: _plot_lengths(axes, summary, lengths), height=3.7)
    plots += "<p>A bar's height is the number of samples of that length; its blue part is their pictures' share.</p>"
    if len(slices):
        plots += "<h2>Slices of a picture</h2>" + _plot(lambda axes: _plot_slices(axes, slices), height=2.1)
    tables = _spread_table(summary["tokens"]) + _cut_table(summary, len(lengths["total"]))
    panels = panel("How long the samples are", plots) + panel("Tokens of a sample", tables)
    return f'<div class="panels">{panels}</div>'


def _plot(draw: Callable[[Axes], None], height: float) -> str:
    # Not at the top: only a report needs matplotlib.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return f'<img class="plot" alt="{escape(axes.get_xlabel())}" src="{data_uri("svg+xml", buffer.getvalue())}">'


def _plot_lengths(axes: Axes, summary: dict, lengths: dict[str, np.ndarray]) -> None:
    """Samples by length; each bar is shared out as the tokens of its samples are."""
    total, spread = lengths["total"], summary["tokens"]["total"]
    recommended, limit = summary["recommended_model_max_length"], summary["model_max_length"]
    right = max(spread["max"], recommended or 0)
    if right > 10 * spread["median"]:  # a few very long ones would leave a single bar for all others
        axes.set_xscale("log")
        bins = np.geomspace(spread["min"], right + 1, 41)
    else:
        bins = np.linspace(0, right + 1, 41)
    shares = [lengths[kind] / total for kind in ("picture", "text")]
    axes.hist(
        [total, total],
        bins,
        weights=shares,
        stacked=True,
        color=[COLOURS["picture"], COLOURS["text"]],
        label=["picture tokens", "text tokens"],
    )
    lines = [
        ("95 % of samples", spread["p95"], "#555", ":"),
        ("99 % of samples", spread["p99"], "#555", "--"),
        ("longest", spread["max"], "#222", "-"),
        ("recommended", recommended, "#1a7f37", "-"),
        ("--model_max_length", limit, "#cf222e", "-"),
    ]
    for name, value, colour, style in lines:
        if value and value <= 1.5 * right:
            axes.axvline(value, color=colour, linestyle=style, linewidth=1.4, label=f"{name}: {value:,}")
        elif value:
            axes.plot([], [], " ", label=f"{name}: {value:,} (far right)")
    axes.set_xlabel("tokens of a sample")
    axes.set_ylabel("samples")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")


def _plot_slices(axes: Axes, slices: np.ndarray) -> None:
    numbers, counts = np.unique(slices, return_counts=True)
    bars = axes.bar(numbers, counts, color=COLOURS["picture"])
    axes.bar_label(bars, [f"{count:,}" for count in counts], fontsize="small")
    axes.set_xticks(numbers)
    axes.set_xlabel("slices of a picture, its overview counted")
    axes.set_ylabel("pictures")
    axes.margins(y=0.15)


def _spread_table(tokens: dict) -> str:
    rows = [
        f"<tr><th>{kind}</th>{''.join(f'<td>{spread[name]:,}</td>' for name in SPREAD)}</tr>"
        for kind, spread in tokens.items()
        if spread
    ]
    head = "".join(f"<th>{name}</th>" for name in SPREAD.values())
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _cut_table(summary: dict, count: int) -> str:
    rows = []
    for length, cut in summary["truncated_at"].items():
        marks = [mark for mark in ("recommended", "chosen") if str(summary[MARKED[mark]]) == length]
        rows.append(
            f'<tr class="{" ".join(marks)}"><th>{length} <small>{", ".join(marks)}</small></th>'
            f"<td>{cut:,}</td><td>{cut / count:.1%}</td></tr>"
        )
    return f"<table><tr><th>--model_max_length</th><th>samples cut</th><th></th></tr>{''.join(rows)}</table>"


def _problems(problems: Sequence[dict]) -> str:
    if not problems:
        return ""
    rows = []
    for problem in problems[:MAX_PROBLEMS]:
        cells = [problem["file"] or "–", problem["index"], shown(problem["id"]), problem["cause"]]
        rows.append(f"<tr>{''.join(f'<td>{shown_text(cell)}</td>' for cell in cells)}</tr>")
    more = len(problems) - MAX_PROBLEMS
    return panel(
        f"Problems: samples that cannot be used ({len(problems):,})",
        "<table class='problems'><tr><th>file</th><th>sample</th><th>id</th><th>what is wrong</th></tr>"
        f"{''.join(rows)}</table>{f'<p>and {more:,} more</p>' if more > 0 else ''}",
    )


def _contents(cards: Sequence[Card]) -> str:
    """What the colours mean, and links to the cards."""
    if not cards:
        return ""
    links = "".join(
        f'<li><a href="#sample{n}">{shown_text(card.name)}</a> {_badges(card)}</li>' for n, card in enumerate(cards, 1)
    )
    return panel("Samples as the model sees them", f'<div class="contents"><div>{LEGEND}</div><ol>{links}</ol></div>')


LEGEND = """<dl class="legend">
<dt><span class="t text learned">green</span></dt><dd>learned: the model is trained to say this</dd>
<dt><span class="t text">grey</span></dt><dd>read, not learned: questions and the words around a turn</dd>
<dt><span class="t picture">picture 1 · overview</span></dt>
<dd>where the model sees a slice of a picture; click it to find the slice</dd>
<dt><span class="t special">&lt;image&gt;</span></dt><dd>a special token: one sign of its own for the model</dd>
<dt><span class="t ghost learned">&lt;/s&gt;</span></dt>
<dd>predicted here, not in the input: the model learns to say it, and never reads it</dd>
<dt><span class="t text cut">faded</span></dt><dd>cut off by --model_max_length: the model never sees it</dd>
<dt><span class="t text"><i class="nl"></i></span> <span class="t text blank"> </span></dt>
<dd>a new line, and a space that is a token</dd>
</dl><p>Every coloured piece is one token; hold the mouse over it for its id and position. The bar above
each sample shows all of it, from first to last token. Pictures are drawn from the pixels that the
model is given.</p>"""

STYLE = """
.contents ol { margin: 0; padding-left: 1.6rem }
.plot { display: block; width: 100%; max-width: 680px; margin: 0 auto .8rem }
th:first-child, .problems th, .problems td { text-align: left; vertical-align: top }
.problems td { white-space: normal }
.problems td:first-child { min-width: 14rem }
.problems td:last-child { width: 60% }
tr.recommended { background: #eef8f0 }
.recommended > *, .chosen > * { font-weight: 600 }
.legend { display: grid; grid-template-columns: auto 1fr; gap: .3rem .9rem; margin: 0 0 .5rem; align-items: baseline }
.legend dd { margin: 0 }
.bad b { color: inherit }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .4em }
.key.picture { background: var(--picture) }
.key.text { background: var(--text) }
.key.learned { background: var(--learned) }
.strip { display: block; width: 100%; height: 12px; border-radius: 4px; margin: .3rem 0 .9rem; background: #fff }
.strip .picture { fill: var(--picture) }
.strip .text { fill: var(--text) }
.strip .learned { fill: var(--learned) }
.strip .cut { opacity: .3 }
.columns { display: grid; grid-template-columns: minmax(0, 40%) minmax(0, 1fr); gap: 1.4rem; align-items: start }
.columns.alone, .columns:has(.zoom:checked) { grid-template-columns: minmax(0, 1fr) }
.pictures { max-height: 44rem; overflow: auto }
.pictures:has(.zoom:checked) { max-height: 92vh }
.picture + .picture { margin-top: 1rem }
.picture label { float: right; font-size: .8rem; color: #57606a; cursor: pointer; user-select: none }
.picture .zoom { vertical-align: -2px; margin: 0 .35em 0 0 }
.picture p { font-size: .8rem; color: #57606a }
.parts { display: flex; gap: 1rem; align-items: flex-start; margin: .3rem 0 }
.grid { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 3px; width: var(--fit);
  min-width: 0 }
.picture:has(.zoom:checked) .grid { width: calc(var(--full) + 3px * (var(--columns) - 1)); flex: none }
.grid img { display: block; width: 100%; height: auto; outline: 1px solid #0002; outline-offset: -1px }
.grid img.cut { opacity: .25 }
.grid img:target { outline: 4px solid #f08c00; outline-offset: -2px; z-index: 1; position: relative }
.grid img, .cutline { scroll-margin: 8rem }
.jumps { font-size: .85rem; margin: 0 0 .4rem }
.stream { max-height: 42rem; overflow: auto; border: 1px solid var(--line); border-radius: 8px }
.turn { border-left: 5px solid #e3e7ec; padding: .4rem .8rem; display: grid; gap: 0 .6rem;
  grid-template-columns: 6.2rem minmax(0, 1fr) }
.turn + .turn { border-top: 1px solid var(--line) }
.turn.taught { border-left-color: var(--learned) }
.turn:target { background: #fff9e8 }
.role { font-size: .8rem; color: #57606a; padding-top: .2rem }
.role b { color: #1f2328; display: block; font-size: .88rem }
.role span { display: block }
.taught .role b, .role .learned { color: #1a7f37; font-weight: 600 }
.tokens { white-space: pre-wrap; line-height: 1.85; unicode-bidi: plaintext }
.t { background: #eceff2; border-radius: 3px; padding: .12em 0; margin-right: 1px; -webkit-box-decoration-break: clone;
  box-decoration-break: clone }
.t.learned { background: #c5ebcf; color: #08401a }
.t.special { font: .8em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; color: #6b3fa0;
  background: #f2ecfa; padding: .15em .2em; white-space: nowrap }
.t.special.learned { background: #c5ebcf; color: #08401a; box-shadow: inset 0 0 0 1px #7cc592 }
a.t.picture, span.t.picture { background: #d6e7fa; color: #0b3f7a; font-size: .8em; padding: .15em .5em;
  white-space: nowrap; text-decoration: none; border-radius: 1em }
.t.ghost { font-size: .85em; background: #fff; color: #08401a; border: 1.5px dashed var(--learned); padding: 0 .25em }
.t.cut { opacity: .45; text-decoration: line-through }
.refused .t { text-decoration: none }
.nl::before { content: "↵"; color: #8b949e }
.tab::before { content: "→"; color: #8b949e }
.blank::before { content: "␣"; color: #8b949e; width: 0; display: inline-block; }
.nl, .tab { font-style: normal }
.cutline { margin: .5rem 0; padding: .1rem .7rem; border-top: 2px dashed var(--bad); background: #fff0f0;
  color: #a40e26; font-size: .85rem; font-weight: 600 }
@media (max-width: 900px) {
  body { padding: .8rem }
  .columns { grid-template-columns: minmax(0, 1fr) }
  .turn { grid-template-columns: minmax(0, 1fr) }
  .role b, .role span { display: inline; margin-right: .7em }
  .legend { grid-template-columns: 1fr; gap: 0 }
  .legend dd { margin-bottom: .45rem }
  .tile b { font-size: 1.5rem }
  .tile.flag b { font-size: 1rem }
  th, td { padding: .2rem .25rem; font-size: .9rem }
  .tiles { grid-template-columns: repeat(6, 1fr) }
  .tile { grid-column: span 2; padding: .5rem .7rem }
  .tile:nth-child(4), .tile:nth-child(5) { grid-column: span 3 }
  .tile.flag { grid-column: span 6 }
  .problems, .problems tbody, .problems tr, .problems td, .problems td:last-child { display: block; width: auto }
  .problems td { border: 0; padding: 0 }
  .problems td:nth-child(2)::before { content: "sample " }
  .problems td:nth-child(3)::before { content: "id " }
  .problems td:last-child { border-bottom: 1px solid #e8ebef; padding-bottom: .5rem; margin-bottom: .5rem }
  .problems tr:first-child { display: none }
}
@media print {
  h2, h3, h4 { break-after: avoid }
  body { background: #fff; max-width: none; padding: 0 }
  .stream, .pictures, .files { max-height: none; overflow: visible }
  .picture label, .jumps { display: none }
  .picture, .tile, .plot, tr { break-inside: avoid }
}
"""
