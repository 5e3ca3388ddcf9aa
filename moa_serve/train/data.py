"""Data files to examples: JSON arrays and JSON lines of instructions, of chats, of MAWPS problems; the paper's choice tasks in two forms.

Every fault is one line that names the file, the row and the field: a run of hours shall not end in a KeyError. No tokens here, see
`prompts`.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Never

from moa_serve.errors import DataInvalid
from moa_serve.train import tasks
from moa_serve.train.tasks import Form

Kind = Literal["math", "letter", "choice", "text", "chat"]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat."""

    role: str
    text: str

    @property
    def more(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data file.

    Args:
        kind: how an answer to it is judged. math: by its last number; letter: by its first capital A to E; choice: by the label or the
            text of a choice; text: by its text, if there is a gold one; chat: not at all.
        instruction, input: of the prompt. "" for a chat.
        output: the response to train on. Of a math test file it may be wrong, see `answer`.
        answer: the gold answer: a number, a letter, a label, the text of a choice, or a text.
        choices: responses that can be compared by their likelihood; () where there are none.
        gold: index of the right one.
        labels: what names the choices in a response, in the form of the authors; () in cloze form, where a choice is its own text.
        messages: of a chat.
        row: index in its file, from 0.
        where: the row as messages name it.
    """

    kind: Kind
    instruction: str = ""
    input: str = ""
    output: str = ""
    answer: str | None = None
    choices: tuple[str, ...] = ()
    gold: int | None = None
    labels: tuple[str, ...] = ()
    messages: tuple[Turn, ...] = ()
    row: int = 0
    where: str = ""


def find_file(path: str | PathLike[str], split: str) -> Path:
    """A file as it is, or a folder's `split`.json or .jsonl (test, train).

    Raises:
        DataInvalid: there is none.
    """
    path = Path(path)
    if path.is_dir():
        for suffix in (".json", ".jsonl"):
            if (found := path / f"{split}{suffix}").is_file():
                return found
        raise DataInvalid(f"{path}: the folder has no {split}.json or {split}.jsonl; name a file", param="data")
    if not path.is_file():
        raise DataInvalid(f"{path}: there is no such file; give a .json or .jsonl file, or a folder with {split}.json", param="data")
    return path


def data_digest(paths: Iterable[str | PathLike[str]]) -> str:
    """sha256 of the files' bytes, one after the other: what `cat FILES | sha256sum` says."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(_read(Path(path)))
    return digest.hexdigest()


def read_examples(path: str | PathLike[str], form: Form = "authors", *, needs_output: bool = True) -> list[Example]:
    """All rows of a file.

    Args:
        path: a JSON array of objects, or JSON lines. A row is {instruction, input?, output, answer?}, {messages: [{role, content}...]},
            or MAWPS's {original_text, equation, ans}; further fields are not looked at.
        form: of the choice tasks, other rows are the same in both. "authors": the choices are listed in the instruction, and the response
            names one by its label. "cloze": the instruction is the question alone, and the response is the text of the choice.
        needs_output: whether an empty output is a fault even where there is a gold answer. To train it is; the authors' GSM8K has such
            rows to test with.
    Raises:
        DataInvalid: the file is empty, is no JSON, or a row is not one of these; names the row and the field.
    """
    path = Path(path)
    examples = [_Row(value, index, where, needs_output).example(form) for index, (where, value) in enumerate(_values(path))]
    if not examples:
        raise DataInvalid(f"{path}: has no rows; a row is an object with 'instruction' and 'output', or with 'messages'", param="data")
    return examples


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataInvalid(f"{path}: cannot be read ({error.strerror})", param="data") from None


def _values(path: Path) -> list[tuple[str, Any]]:
    """(where, value) of every row. An array begins with a bracket; all else is one value a line."""
    try:
        text = _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataInvalid(f"{path}: is not UTF-8 text (byte {error.start})", param="data") from None
    if not text.strip():
        raise DataInvalid(f"{path}: is empty", param="data")
    if not text.lstrip().startswith("["):
        lines = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [(where, _parsed(line, where, "; each line must be one object")) for where, line in lines]
    return [(f"{path}, row {number}", value) for number, value in enumerate(_parsed(text, str(path)), start=1)]


def _parsed(text: str, where: str, hint: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if not hint else f"column {error.colno}"
        raise DataInvalid(f"{where}: is not valid JSON ({error.msg}, {place}){hint}", param="data") from None
    except ValueError:  # Python's own limit
        raise DataInvalid(f"{where}: has a number of thousands of digits", param="data") from None
    except RecursionError:
        raise DataInvalid(f"{where}: is not valid JSON (nested too deeply)", param="data") from None


class _Row:
    """One row while it is read."""

    def __init__(self, value: Any, index: int, where: str, needs_output: bool) -> None:
        self.value, self.index, self.where, self.needs_output = value, index, where, needs_output

    def refuse(self, reason: str) -> Never:
        raise DataInvalid(f"{self.where}: {reason}", param="data")

    def example(self, form: Form) -> Example:
        if not isinstance(self.value, dict):
            self.refuse(f"must be an object, not {_kind(self.value)}")
        if "messages" in self.value:
            return self._chat()
        if "original_text" in self.value:
            return self._mawps()
        if "instruction" not in self.value and "output" not in self.value:
            has = f"has the fields {', '.join(self.value)}" if self.value else "has no fields"
            self.refuse(f"{has}; wanted are instruction and output, or messages, or original_text, equation and ans")
        return self._instruction(form)

    def text(self, field: str, *, may_be_empty: bool = False) -> str:
        if field not in self.value:
            self.refuse(f"has no {field!r}")
        value = self.value[field]
        if not isinstance(value, str):
            self.refuse(f"{field!r} must be text, not {_kind(value)}")
        if not value.strip() and not may_be_empty:
            self.refuse(f"{field!r} is empty")
        return self.unicode(value.strip(), repr(field))

    def unicode(self, text: str, what: str) -> str:
        """`text`, which JSON can fill with halves of characters that no tokenizer takes."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            self.refuse(f"{what} is not Unicode: the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}")
        return text

    def _instruction(self, form: Form) -> Example:
        instruction = self.text("instruction")
        extra = self.text("input", may_be_empty=True) if self.value.get("input") is not None else ""
        answer = self._answer()
        output = self.text("output", may_be_empty=answer is not None and not self.needs_output)
        plain = Example("text", instruction, extra, output, answer, row=self.index, where=self.where)
        try:
            offered = tasks.parse_choices(instruction) if answer is not None else None
        except tasks.Unparsed as error:
            self.refuse(f"offers choices, but {error}")
        if offered is not None:
            return self._choice(plain, offered, form)
        if answer is not None and _is_number(answer):
            return replace(plain, kind="math")
        return plain

    def _choice(self, plain: Example, offered: tasks.Choices, form: Form) -> Example:
        if plain.answer not in offered.labels:
            self.refuse(f"'answer' is {plain.answer!r}, but must be one of {', '.join(offered.labels)}")
        gold = offered.labels.index(plain.answer)
        if form == "cloze":
            text = offered.texts[gold]
            return replace(plain, kind="choice", instruction=offered.question, output=text, answer=text, choices=offered.texts, gold=gold)
        is_lettered = offered.labels == tasks.LETTERS
        choices = tuple(f"The answer is ({x})." if is_lettered else f"the correct answer is {x}" for x in offered.labels)
        return replace(plain, kind="letter" if is_lettered else "choice", choices=choices, gold=gold, labels=offered.labels)

    def _answer(self) -> str | None:
        value = self.value.get("answer")
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not _is_number(str(value)):
                self.refuse("'answer' must be a finite number or text")
            return tasks.format_number(value)
        return None if value is None else self.text("answer")

    def _mawps(self) -> Example:
        problem, equation, answer = self.text("original_text"), self.text("equation"), self.value.get("ans")
        if answer is None:
            self.refuse("has no 'ans'")
        if isinstance(answer, bool) or not isinstance(answer, int | float | str) or not _is_number(str(answer)):
            self.refuse(f"'ans' must be a number, not {_kind(answer)}")
        number = tasks.format_number(float(str(answer).replace(",", "")))
        try:
            output = f"{tasks.format_equation(equation)}\nThe answer is {number}"
        except tasks.Unparsed as error:
            self.refuse(str(error))
        return Example("math", problem, output=output, answer=number, row=self.index, where=self.where)

    def _chat(self) -> Example:
        messages = self.value["messages"]
        if not isinstance(messages, list) or not messages:
            self.refuse(f"'messages' must be a list of messages, not {_kind(messages)}")
        turns = tuple(self._turn(number, message) for number, message in enumerate(messages, start=1))
        if not any(turn.role == "assistant" for turn in turns):
            self.refuse("'messages' has no message of the assistant, so there is nothing to learn")
        if turns[0].role == "assistant":
            self.refuse("message 1 is the assistant's, so it answers nothing; a chat begins with a system or user message")
        return Example("chat", messages=turns, row=self.index, where=self.where)

    def _turn(self, number: int, message: Any) -> Turn:
        if not isinstance(message, dict):
            self.refuse(f"message {number} must be an object, not {_kind(message)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            self.refuse(f"message {number}: 'role' must be one of {', '.join(ROLES)}, not {role!r}")
        if not isinstance(content, str):
            self.refuse(f"message {number}: 'content' must be text, not {_kind(content)}")
        if role == "assistant" and not content.strip():
            self.refuse(f"message {number}: 'content' is empty")
        return Turn(role, self.unicode(content, f"message {number}: 'content'"))


def _is_number(text: str) -> bool:
    """A finite number, thousands' commas allowed."""
    try:
        return abs(float(text.replace(",", ""))) < float("inf")
    except ValueError:
        return False


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list" if value else "an empty list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
