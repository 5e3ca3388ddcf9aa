"""Data files: every schema, both forms of a choice, and one line for everything that can be wrong."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from moa_serve.errors import DataInvalid
from moa_serve.train.data import Example, Turn, data_digest, find_file, read_examples
from moa_serve.train.tasks import last_number

QUESTION = (
    "Please choose the correct answer to the question: Where does it rain?\n\n"
    "Answer1: in the sea Answer2: in the wood. Answer3: here\n\nAnswer format: answer1/answer2/answer3"
)
CHOICE = {"instruction": QUESTION, "input": "", "output": "the correct answer is answer2", "answer": "answer2"}
LETTERED = {"instruction": "Two and two? Answer Choices: (A) 1 (B) 2 (C) 3 (D) 4 (E) 5", "output": "\nIt is (D).", "answer": "D"}
PLAIN = {"instruction": " Say hello. ", "input": "In French.", "output": "\nBonjour.\n"}
MAWPS = {"id": 7, "original_text": "Ann has 4 nuts and eats 1 .", "equation": "X=(4.0-1.0)", "ans": 3.0}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello. "}]}


def write(folder: Path, rows: Any, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return path


def one(folder: Path, row: Any, form: Any = "authors", **more: Any) -> Example:
    (example,) = read_examples(write(folder, [row]), form, **more)
    return example


# -- what is read


def test_an_instruction_is_stripped_and_may_have_an_input(tmp_path: Path) -> None:
    example = one(tmp_path, PLAIN)
    assert (example.kind, example.instruction, example.input, example.output) == ("text", "Say hello.", "In French.", "Bonjour.")
    assert (example.answer, example.choices, example.gold) == (None, (), None)
    assert one(tmp_path, PLAIN | {"input": None}).input == ""
    assert one(tmp_path, PLAIN | {"answer": "Salut."}).kind == "text"


@pytest.mark.parametrize(("answer", "text"), [("576.0", "576.0"), ("1,250", "1,250"), (3, "3"), (2.5, "2.5"), ("-4", "-4")])
def test_a_row_with_a_number_as_its_answer_is_mathematics(tmp_path: Path, answer: Any, text: str) -> None:
    example = one(tmp_path, PLAIN | {"answer": answer})
    assert (example.kind, example.answer) == ("math", text)


def test_a_choice_in_the_form_of_the_authors(tmp_path: Path) -> None:
    example = one(tmp_path, CHOICE)
    assert (example.kind, example.instruction, example.output, example.answer) == ("choice", QUESTION, CHOICE["output"], "answer2")
    assert example.choices == tuple(f"the correct answer is answer{i}" for i in (1, 2, 3))
    assert (example.gold, example.labels) == (1, ("answer1", "answer2", "answer3"))


def test_a_choice_in_cloze_form_names_no_label(tmp_path: Path) -> None:
    example = one(tmp_path, CHOICE, "cloze")
    assert (example.kind, example.instruction, example.output, example.answer) == (
        "choice",
        "Where does it rain?",
        "in the wood.",
        "in the wood.",
    )
    assert (example.choices, example.gold, example.labels) == (("in the sea", "in the wood.", "here"), 1, ())


def test_lettered_choices_in_both_forms(tmp_path: Path) -> None:
    example = one(tmp_path, LETTERED)
    assert (example.kind, example.answer, example.gold, example.choices[3]) == ("letter", "D", 3, "The answer is (D).")
    example = one(tmp_path, LETTERED, "cloze")
    assert (example.kind, example.instruction, example.output, example.choices) == (
        "choice",
        "Two and two?",
        "4",
        ("1", "2", "3", "4", "5"),
    )


def test_true_and_false_are_their_own_texts(tmp_path: Path) -> None:
    question = "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false"
    row = {"instruction": question, "output": "the correct answer is false", "answer": "false"}
    assert one(tmp_path, row).choices == ("the correct answer is true", "the correct answer is false")
    assert (one(tmp_path, row, "cloze").instruction, one(tmp_path, row, "cloze").output) == ("is it?", "false")


@pytest.mark.parametrize("ans", [3.0, 3, "3", "3.0"])
def test_mawps_is_an_equation_and_a_number(tmp_path: Path, ans: Any) -> None:
    example = one(tmp_path, MAWPS | {"ans": ans})
    assert (example.kind, example.instruction, example.answer) == ("math", "Ann has 4 nuts and eats 1 .", "3")
    assert example.output == "x = 4 - 1\nThe answer is 3"


def test_a_number_of_thousands_may_have_a_comma(tmp_path: Path) -> None:
    assert one(tmp_path, MAWPS | {"ans": "1,003"}).answer == "1003"


def test_a_chat_keeps_its_messages_as_they_are(tmp_path: Path) -> None:
    example = one(tmp_path, CHAT)
    assert (example.kind, example.messages) == ("chat", (Turn("user", "Hi"), Turn("assistant", "Hello. ")))


def test_json_lines_and_arrays_are_the_same_rows(tmp_path: Path) -> None:
    rows = [PLAIN, CHOICE, MAWPS, CHAT]
    lines = "\ufeff" + "\n\n".join(json.dumps(row) for row in rows) + "\r\n"
    array = read_examples(write(tmp_path, rows))
    listed = read_examples(write(tmp_path, lines, "rows.jsonl"))
    assert [example.kind for example in array] == ["text", "choice", "math", "chat"]
    assert [example.row for example in array] == [example.row for example in listed] == [0, 1, 2, 3]
    assert (array[2].where, listed[2].where) == (f"{tmp_path}/rows.json, row 3", f"{tmp_path}/rows.jsonl:5")
    assert [(e.kind, e.instruction, e.output, e.messages) for e in array] == [(e.kind, e.instruction, e.output, e.messages) for e in listed]


def test_a_test_row_needs_no_output_where_it_has_an_answer(tmp_path: Path) -> None:
    """The authors' GSM8K has a row whose rationale is empty; to train on it would teach silence."""
    row = PLAIN | {"output": " \n", "answer": "7"}
    assert one(tmp_path, row, needs_output=False).output == ""
    for rows, needs_output in (([row], True), ([PLAIN | {"output": ""}], False)):
        with pytest.raises(DataInvalid, match="row 1: 'output' is empty"):
            read_examples(write(tmp_path, rows), needs_output=needs_output)


# -- what is wrong


BAD_ROWS: list[tuple[Any, str]] = [
    ([1], "row 1: must be an object, not a number"),
    ([PLAIN, "text"], "row 2: must be an object, not text"),
    ([PLAIN, {}], "row 2: has no fields; wanted are instruction and output, or messages"),
    ([{"task_id": "X/0", "prompt": "def f"}], "row 1: has the fields task_id, prompt; wanted are instruction and output, or messages"),
    ([{"instruction": "a"}], "row 1: has no 'output'"),
    ([{"output": "a"}], "row 1: has no 'instruction'"),
    ([PLAIN, PLAIN | {"output": ""}], "row 2: 'output' is empty"),
    ([PLAIN | {"instruction": " \n"}], "row 1: 'instruction' is empty"),
    ([PLAIN | {"output": 5}], "row 1: 'output' must be text, not a number"),
    ([PLAIN | {"output": None}], "row 1: 'output' must be text, not null"),
    ([PLAIN | {"instruction": ["a"]}], "row 1: 'instruction' must be text, not a list"),
    ([PLAIN | {"input": {}}], "row 1: 'input' must be text, not an object"),
    ([PLAIN | {"answer": True}], "row 1: 'answer' must be text, not true or false"),
    ([CHOICE | {"answer": "answer4"}], "row 1: 'answer' is 'answer4', but must be one of answer1, answer2, answer3"),
    (
        [CHOICE | {"instruction": QUESTION.replace("Answer3:", "")}],
        "row 1: offers choices, but 'Answer3:' stands in it 0 times instead of once",
    ),
    ([{"original_text": "a", "ans": 1.0}], "row 1: has no 'equation'"),
    ([{"original_text": "a", "equation": "x=1"}], "row 1: has no 'ans'"),
    ([MAWPS | {"ans": "many"}], "row 1: 'ans' must be a number, not text"),
    ([MAWPS | {"ans": [3]}], "row 1: 'ans' must be a number, not a list"),
    ([MAWPS | {"ans": "nan"}], "row 1: 'ans' must be a number, not text"),
    ([PLAIN | {"answer": 10**400}], "row 1: 'answer' must be a finite number or text"),
    ([PLAIN | {"output": "a\ud800"}], "row 1: 'output' is not Unicode: the lone surrogate U+D800 at character 1"),
    ([{"messages": [{"role": "user", "content": "\udfff"}]}], "row 1: message 1: 'content' is not Unicode: the lone surrogate U+DFFF"),
    ([MAWPS | {"equation": "x=?"}], "row 1: the equation 'x=?' cannot be read"),
    ([{"messages": []}], "row 1: 'messages' must be a list of messages, not an empty list"),
    ([{"messages": "hi"}], "row 1: 'messages' must be a list of messages, not text"),
    ([{"messages": ["hi"]}], "row 1: message 1 must be an object, not text"),
    ([{"messages": [{"role": "user", "content": "a"}]}], "row 1: 'messages' has no message of the assistant, so there is nothing to learn"),
    ([{"messages": [{"role": "assistant", "content": "a"}]}], "row 1: message 1 is the assistant's, so it answers nothing; a chat begins"),
    ([{"messages": [{"role": "bot", "content": "a"}]}], "row 1: message 1: 'role' must be one of system, user, assistant, not 'bot'"),
    ([{"messages": [{"role": "assistant"}]}], "row 1: message 1: 'content' must be text, not null"),
    ([{"messages": [{"role": "assistant", "content": " "}]}], "row 1: message 1: 'content' is empty"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS)
def test_a_bad_row_is_one_line_that_names_it(tmp_path: Path, rows: Any, message: str) -> None:
    path = write(tmp_path, rows)
    with pytest.raises(DataInvalid) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}, {message}")
    assert (len(str(caught.value).splitlines()), caught.value.code) == (1, "data_invalid")


BAD_FILES = [
    ("", "{path}: is empty"),
    (" \n\n", "{path}: is empty"),
    ("[]", "{path}: has no rows; a row is an object with 'instruction' and 'output', or with 'messages'"),
    ('[{"instruction": "a",]', "{path}: is not valid JSON (Illegal trailing comma before end of object, line 1"),
    ("[1,\n2", "{path}: is not valid JSON (Expecting ',' delimiter, line 2, column 2)"),
    ("[" * 100_000, "{path}: is not valid JSON (nested too deeply)"),
    (
        '{"instruction": "a", "output": "b"}\n{"instruction"}\n',
        "{path}:2: is not valid JSON (Expecting ':' delimiter, column 15); each line",
    ),
    (
        '{\n"instruction": "a", "output": "b"}\n',
        "{path}:1: is not valid JSON (Expecting property name enclosed in double quotes, column 2)",
    ),
    ('{"instruction": "a", "output": "b"}\n\n5\n', "{path}:3: must be an object, not a number"),
    ('[{"answer": ' + "1" * 5000 + "}]", "{path}: has a number of thousands of digits"),
    ("instruction,output\na,b\n", "{path}:1: is not valid JSON (Expecting value, column 1); each line must be one object"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataInvalid) as caught:
        read_examples(path)
    wanted = message.format(path=path)
    if "trailing comma" in message:  # Python 3.13 says what it is, earlier ones what they had expected
        wanted = f"{path}: is not valid JSON ("
    assert str(caught.value).startswith(wanted)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes('[{"instruction": "é"}]'.encode("latin-1"))
    with pytest.raises(DataInvalid, match=r"latin.json: is not UTF-8 text \(byte 18\)"):
        read_examples(tmp_path / "latin.json")
    with pytest.raises(DataInvalid, match=r"none.json: cannot be read \(No such file or directory\)"):
        read_examples(tmp_path / "none.json")


# -- files


def test_a_folder_means_its_split(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    with pytest.raises(DataInvalid, match=r"task: the folder has no test.json or test.jsonl"):
        find_file(tmp_path / "task", "test")
    lines = write(tmp_path / "task", "", "test.jsonl")
    assert find_file(tmp_path / "task", "test") == lines
    array = write(tmp_path / "task", "", "test.json")
    assert find_file(tmp_path / "task", "test") == array
    assert find_file(str(lines), "train") == lines
    with pytest.raises(DataInvalid, match="there is no such file"):
        find_file(tmp_path / "nowhere", "test")


def test_the_digest_is_what_the_shell_says(tmp_path: Path) -> None:
    files = [write(tmp_path, "ab", "1"), write(tmp_path, "c", "2")]
    assert data_digest(files) == hashlib.sha256(b"abc").hexdigest()
    assert data_digest(files[::-1]) != data_digest(files)


# -- the authors' files, where they are


DATASETS = os.environ.get("MOA_DATASETS_DIR")


@pytest.mark.skipif(DATASETS is None, reason="MOA_DATASETS_DIR names no copy of the authors' data sets")
def test_every_row_of_the_authors_files_is_read_in_both_forms() -> None:
    assert DATASETS is not None
    files = sorted(path for path in Path(DATASETS).glob("*/*.json") if path.parent.name != "humaneval")
    assert len(files) > 15
    for file in files:
        numbered, cloze = (read_examples(file, form, needs_output=False) for form in ("authors", "cloze"))
        assert len(numbered) == len(cloze) == len(json.loads(file.read_text())), file
        for ours, other in zip(numbered, cloze, strict=True):
            assert (ours.gold, len(ours.choices)) == (other.gold, len(other.choices)), ours.where
            if ours.choices:
                assert len({*ours.choices}) == len(ours.choices)
                assert other.output == other.choices[other.gold or 0], ours.where
                assert "Answer format" not in other.instruction
            if file.parent.name == "mawps":
                number = last_number(ours.output)
                assert number is not None
                assert abs(number - float(ours.answer or "nan")) <= 1e-3, ours.where
