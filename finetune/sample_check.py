"""What may stand in a sample: checked, and brought to the one form that everything else reads.

Nothing that carries content is dropped: what has no meaning here is refused by name, and fields that nobody knows are
told of once for all data (`remarks_of`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from finetune.errors import shown
from finetune.minicpmv.conversation import (
    IMAGE_MARK,
    NUMBERED_MARK,
    PICTURE_TOKENS,
    check_roles,
    control_words,
    place_pictures,
)
from finetune.pictures import is_picture, map_pictures, picture_paths

PLACEHOLDER_WORDS = re.compile("</image>|<slice>|</slice>|<unk>")  # they stand for pictures only, in any turn
PICTURE_WORDS = re.compile(f"{PLACEHOLDER_WORDS.pattern}|{IMAGE_MARK}|{NUMBERED_MARK.pattern}")  # outside user turns
MARK_NAME = re.compile(r"<image(_\w+)?>")

SAMPLE_FIELDS = frozenset(("conversations", "image", "system", "id"))
TURN_FIELDS = frozenset(("role", "content", "weight", "loss", "train"))
LEARNED_BY = ("weight", "loss", "train")
SPELLING = (
    "what is read is 'conversations', turns with 'role' ('user' or 'assistant') and 'content' (text), and pictures in "
    "'image'"
)
ROLES = {"user": "user", "assistant": "assistant", "system": "system"}
OTHER_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant"}
# Samples without 'conversations': the fields that tell whose format it is, all of which must be there, and the others.
FORMATS = (
    (("messages",), (), "OpenAI, LLaMA-Factory and ms-swift"),
    (("conversation",), (), "XTuner and InternVL"),
    (("instruction",), ("input", "output"), "Alpaca"),
    (("query", "response"), ("history",), "ms-swift"),
    (("question", "answer"), (), "question and answer pairs"),
    (("prompt", "completion"), (), "prompts with their completions"),
    (("prompt", "response"), (), "prompts with their responses"),
    (("input", "output"), (), "XTuner"),
)
TURN_FORMATS = {("from", "value"): "LLaVA and ShareGPT", ("input", "output"): "XTuner"}

_PICTURES = "what pictures it names belong into 'image' of the sample"
_TOOLS = "the models have no words for tools; write it into the turns, or leave it out"
_THOUGHT = "write it into 'content', or leave it out"
_VIDEO = "the models see no videos; name frames of it as pictures in 'image', or leave it out"
_AUDIO = "the models hear nothing; write it as text, or leave it out"
_TURNS = "its turns belong into 'conversations'"
_SYSTEM = "its text belongs into 'system'"
# Fields, in small letters, that carry content and are not read, neither in samples nor in turns: what to do.
REFUSED = {
    **dict.fromkeys(("images", "image_path", "image_paths", "image_file", "image_files", "img", "imgs"), _PICTURES),
    **dict.fromkeys(("picture", "pictures", "photo", "photos", "image_url", "image_urls"), _PICTURES),
    **dict.fromkeys(("image_base64", "image_bytes", "image_data", "media"), _PICTURES),
    **dict.fromkeys(("video_file", "video_files", "frames"), _VIDEO),
    **dict.fromkeys(("audio_file", "audio_files", "sound", "sounds", "speech"), _AUDIO),
    **dict.fromkeys(("video", "videos", "video_path", "video_paths", "video_url", "video_urls"), _VIDEO),
    **dict.fromkeys(("audio", "audios", "audio_path", "audio_paths", "audio_url", "audio_urls"), _AUDIO),
    **dict.fromkeys(("tools", "functions", "tool_calls", "tool_call", "function_call", "function_calls"), _TOOLS),
    **dict.fromkeys(("tool_responses", "tool_response", "tool_results", "tool_result"), _TOOLS),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "think"), _THOUGHT),
}
REFUSED_IN_SAMPLES = {
    **dict.fromkeys(("messages", "conversation", "history"), _TURNS),
    **dict.fromkeys(("system_prompt", "system_message", "system_instruction"), _SYSTEM),
}
REFUSED_IN_TURNS = {"image": _PICTURES, "system": "write it as the conversation's first turn, with 'role' 'system'"}

# Kinds of `remarks_of`, and what they say of a number of samples.
UNREAD, UNREAD_IN_TURNS, NO_ID = "unread_fields", "unread_fields_of_turns", "nan_ids"
CONTROL = "control_tokens"
REMARKS = {
    UNREAD: "have fields that are not read",
    UNREAD_IN_TURNS: "have turns with fields that are not read",
    CONTROL: "have words in their texts that are control tokens of the model, and are read as the characters they are",
    NO_ID: "have NaN, as pandas writes a missing value, for their id; leave it out or write null",
}

NAN = "is NaN, as pandas writes a missing value"
SPELLINGS_OF_NOTHING = ("[]", "{}", "null", "none", "nan")
INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")  # Unicode categories: blanks, control and format characters
# Letters and marks that show nothing: fillers, the empty Braille cell, variation selectors, joiners.
FILLERS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def check_sample(sample, llm_type: str) -> Mapping:
    """What can be seen of a sample without a look at its pictures or a tokenizer.

    Args:
        sample: as it stands in the data.
        llm_type: `llama3` (2.5) or `minicpm` (2.0).

    Returns:
        the sample with `system` as its first turn, and `loss` and `train` as `weight`.

    Raises:
        ValueError: saying which field or turn, numbered as in the data, is wrong.
    """
    if not isinstance(sample, Mapping):
        raise ValueError(f"is a {type(sample).__name__}, expected an object with 'conversations'")
    turns = sample.get("conversations")
    if not isinstance(turns, list):
        raise ValueError(_without_conversations(sample))
    weights = [_check_turn(number, turn) for number, turn in enumerate(turns)]
    check_roles(turns, llm_type)
    if turns[-1]["role"] != "assistant":
        raise ValueError("the last turn is the user's; there is no answer to learn at its end")
    _refuse("", sample, SAMPLE_FIELDS, REFUSED_IN_SAMPLES)
    system = _system_text(sample, turns, llm_type)
    _check_pictures(sample.get("image"), turns)
    if system is None and not any("loss" in turn or "train" in turn for turn in turns):
        return sample
    read = [
        {"role": turn["role"], "content": turn["content"], **({} if weight is None else {"weight": weight})}
        for turn, weight in zip(turns, weights, strict=True)
    ]
    if system is not None:
        read.insert(0, {"role": "system", "content": system})
    return {**{name: value for name, value in sample.items() if name != "system"}, "conversations": read}


def remarks_of(sample, tokenizer, llm_type: str) -> dict[str, list[str]]:
    """What is no fault of a sample and yet worth a word: by kind (see `REMARKS`), the names of what it is about."""
    turns = sample.get("conversations") if isinstance(sample, Mapping) else None
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) and "content" in turn for turn in turns):
        return {}  # which is a fault
    in_turns = {name for turn in turns for name in _unread(turn, TURN_FIELDS, REFUSED_IN_TURNS)}
    texts = [text for text in (sample.get("system"), *(turn["content"] for turn in turns)) if isinstance(text, str)]
    control = set(control_words(texts, tokenizer, llm_type)) - set(PICTURE_TOKENS)  # marks of pictures, or refused
    found = {
        UNREAD: _unread(sample, SAMPLE_FIELDS, REFUSED_IN_SAMPLES),
        UNREAD_IN_TURNS: sorted(in_turns),
        CONTROL: sorted(control),
    }
    found = {kind: names for kind, names in found.items() if names}
    return {**found, NO_ID: []} if is_nan(sample.get("id")) else found


def is_nan(value) -> bool:
    """Whether a value is NaN, which pandas writes for what is missing."""
    return isinstance(value, float) and value != value


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it is empty, or blanks, control and format characters are all there is."""
    return all(unicodedata.category(one) in INVISIBLE or FILLERS.match(one) for one in text)


def carries_content(value) -> bool:
    """Whether anything stands in a value: not in None, false, 0, NaN, blank texts, empty lists and objects, lists and
    objects of nothing but these, and the texts `[]`, `{}`, `null`."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif isinstance(one, str):
            if not is_blank(one) and one.strip().lower() not in SPELLINGS_OF_NOTHING:
                return True
        elif one and not is_nan(one):
            return True
    return False


def _is_number(value) -> bool:
    """Whether it is a number or a truth value, which may say something where it is 0 or false too."""
    return isinstance(value, int | float) and not is_nan(value)


def _unread(fields: Mapping, read: frozenset[str], refused: Mapping[str, str]) -> list[str]:
    """Fields that carry something, and are neither read nor refused."""
    if fields.keys() <= read:
        return []
    return [
        str(name)
        for name, value in fields.items()
        if name not in read and not _advice(name, read, refused) and (carries_content(value) or _is_number(value))
    ]


def _advice(name, read: frozenset[str], refused: Mapping[str, str]) -> str | None:
    """What to do about a field that is not read, if it is one that is known."""
    plain = name.strip().lower() if isinstance(name, str) else ""
    return f"write it as {plain!r}" if plain in read and plain != "id" else REFUSED.get(plain) or refused.get(plain)


def _without_conversations(sample: Mapping) -> str:
    found = sample.get("conversations")
    if not carries_content(found):
        for names, others, owner in FORMATS:
            if all(name in sample for name in names):
                fields = ", ".join(repr(name) for name in (*names, *others) if name in sample)
                return f"has {fields}, the format of {owner}, which is not read; {SPELLING}"
    if is_nan(found):
        return f"field 'conversations' {NAN}; {SPELLING}"
    return f"field 'conversations' is {'missing' if found is None else 'not a list'}"


def _check_turn(number: int, turn) -> int | None:
    """The turn's weight, None where the data give none."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"turn {number} is a {type(turn).__name__}, expected {{'role', 'content'}}")
    for field in ("role", "content"):
        if not isinstance(turn.get(field), str):
            raise ValueError(_without_text(number, turn, field))
    role, content = turn["role"], turn["content"]
    where = f"turn {number} ({role})"
    if role not in ROLES:
        meant = f", which is {OTHER_ROLES[role.lower()]!r} here" if role.lower() in OTHER_ROLES else ""
        raise ValueError(
            f"turn {number} has role {shown(role)}{meant}; expected 'user' and 'assistant' in turn, and 'system' in "
            "front of them with 2.5"
        )
    _check_text(where, content, PLACEHOLDER_WORDS if role == "user" else PICTURE_WORDS)
    _refuse(f"{where}: ", turn, TURN_FIELDS, REFUSED_IN_TURNS)
    weight = _weight(where, turn)
    if role == "assistant" and weight != 0 and is_blank(content):
        what = "empty" if not content else "blank"
        raise ValueError(
            f'{where} is {what}, which would teach the model to say nothing; give it a text, or "weight": 0, with '
            "which it is not learned"
        )
    return weight


def _without_text(number: int, turn: Mapping, field: str) -> str:
    for names, owner in TURN_FORMATS.items():
        if any(name in turn for name in names):
            fields = " and ".join(repr(name) for name in names if name in turn)
            return f"turn {number} has {fields}, the format of {owner}, which is not read; {SPELLING}"
    value = turn.get(field)
    if is_nan(value):
        return f"turn {number}: field {field!r} {NAN}; give it a text"
    if field == "content" and isinstance(value, list):
        return f"turn {number}: field 'content' is no text but a list of parts, the format of OpenAI; {SPELLING}"
    return f"turn {number}: field {field!r} is {'missing' if field not in turn else 'no text'}"


def _check_text(where: str, text: str, forbidden: re.Pattern) -> None:
    if word := forbidden.search(text):
        raise ValueError(f"{where} contains {shown(word[0])}, which stands for pictures only")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} is no valid text: {error.reason}") from error


def _refuse(where: str, fields: Mapping, read: frozenset[str], refused: Mapping[str, str]) -> None:
    """
    Raises:
        ValueError: naming a field that carries content and is not read, if it is one that is known.
    """
    for name, value in () if fields.keys() <= read else fields.items():
        says = carries_content(value) or (str(name).strip().lower() in LEARNED_BY and _is_number(value))
        if name not in read and says and (advice := _advice(name, read, refused)):
            raise ValueError(f"{where}field {shown(name)} is not read; {advice}")


def _weight(where: str, turn: Mapping) -> int | None:
    """Whether an answer is learned, 1 or 0, as `weight`, `loss` and `train` say it together; None: as none says."""
    if turn.keys().isdisjoint(LEARNED_BY):
        return None
    given = {name: turn[name] for name in LEARNED_BY if turn.get(name) is not None and not is_nan(turn[name])}
    learned = turn["role"] == "assistant"
    for name, value in given.items():
        if not learned and name != "weight" and value in (0, False):
            continue
        if not learned or value not in (0, 1):
            expected = "1 or 0" if name == "weight" else "true or false"
            raise ValueError(
                f"{where} has {name} {shown(value)}; expected {expected} (0: do not learn this answer), in an "
                "assistant turn; questions are not learned"
            )
    if learned and len(set(map(int, given.values()))) > 1:
        values = " and ".join(f"{name} {value}" for name, value in given.items())
        raise ValueError(f"{where} has {values}, which contradict each other; leave one of them")
    return int(next(iter(given.values()))) if learned and given else None


def _system_text(sample: Mapping, turns: list, llm_type: str) -> str | None:
    """What the field `system` says, None where it says nothing."""
    text = sample.get("system")
    if not carries_content(text):
        return None
    if not isinstance(text, str):
        raise ValueError(f"field 'system' is {shown(text)}, expected a text")
    if llm_type != "llama3":
        raise ValueError(
            "field 'system' has a text, which MiniCPM-V 2.0 has no words for; put it in the first user turn"
        )
    if turns[0]["role"] == "system":
        raise ValueError("has a field 'system' and a system turn as well; leave one of them")
    _check_text("field 'system'", text, PICTURE_WORDS)
    return text


def _check_pictures(image, turns: list) -> None:
    pictures = picture_paths(image)
    if any(map(is_nan, pictures)):
        raise ValueError(f"field 'image' {NAN}: leave the field out or write null")
    if not all(map(is_picture, pictures)):
        raise ValueError("field 'image' is neither a path, nor a list of paths, nor an object from mark to path")
    if "" in pictures:
        raise ValueError("field 'image' has an empty path; leave the field out where there is no picture")
    named = map_pictures(image, lambda picture: picture)
    if isinstance(named, dict) and (names := [name for name in named if not MARK_NAME.fullmatch(name)]):
        raise ValueError(f"field 'image' names {shown(names[0])}; expected marks like '<image_00>'")
    place_pictures(turns, named)
