"""The paper's tasks: what is question and what is choice, and numbers and equations in one way of writing."""

import pytest

from moa_serve.train.tasks import LETTERS, Choices, Unparsed, format_equation, format_number, label_pattern, last_number, parse_choices

NUMBERED = (
    "Please choose the correct answer to the question: Why\nso?\n\n"
    "Answer1: b. Answer2: c: d Answer3: e\n\nAnswer format: answer1/answer2/answer3"
)
SOLUTIONS = "Please choose the correct solution to the question: how\n\nSolution1: a\n\nSolution2: b.\n\nAnswer format: solution1/solution2"
OPTIONS = (
    "Please choose the correct answer to fill in the blank to complete the given sentence: so _ ran.\n\n"
    "Option1: Ann Option2: Bea Answer format: option1/option2"
)
TRUE_FALSE = "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false"
LETTERED = "How many? Answer Choices: (A) 1 (B) 2 apples (C) 3.5 (D) 4 (E) none"


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (NUMBERED, Choices("Why\nso?", ("answer1", "answer2", "answer3"), ("b.", "c: d", "e"))),
        (SOLUTIONS, Choices("how", ("solution1", "solution2"), ("a", "b."))),
        (OPTIONS, Choices("so _ ran.", ("option1", "option2"), ("Ann", "Bea"))),
        (TRUE_FALSE, Choices("is it?", ("true", "false"), ("true", "false"))),
        (LETTERED, Choices("How many?", LETTERS, ("1", "2 apples", "3.5", "4", "none"))),
        ("Add 1 and 2. Answer2: is no choice here", None),
        ("Name the answer format: json", None),
    ],
)
def test_question_labels_and_texts(instruction: str, expected: Choices | None) -> None:
    assert parse_choices(instruction) == expected


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (NUMBERED.replace("c: d", "see Answer1: x"), "'Answer1:' stands in it 2 times"),
        (NUMBERED.replace("Answer3:", "Answer4:"), "'Answer3:' stands in it 0 times"),
        (NUMBERED.replace("Answer2: c: d", "Answer2: "), "nothing stands behind 'Answer2:'"),
        (NUMBERED.replace("Answer1:", "x").replace("Answer2:", "Answer1:").replace("x b", "Answer2: b"), "are not in order"),
        (NUMBERED.replace("answer1/answer2", "answer2/answer1"), "is none that is known"),
        (SOLUTIONS + "/solution3", "is none that is known"),
        (TRUE_FALSE.replace("true/false", "yes/no"), "is none that is known"),
        (LETTERED.replace("(C)", "C:"), r"'\(C\)' stands in it 0 times"),
    ],
)
def test_what_could_be_read_in_two_ways_is_not_read(instruction: str, message: str) -> None:
    """A choice that is cut in two would train and score on nonsense, and nobody would see it."""
    with pytest.raises(Unparsed, match=message):
        parse_choices(instruction)


@pytest.mark.parametrize(
    ("labels", "text", "found"),
    [
        (("answer1", "answer2"), "The correct answer is answer5, or answer1", "answer5"),
        (("true", "false"), "It is untrue", "true"),
        (("option1", "option2"), "option3, no: option2", "option2"),
        (LETTERS, "the Answer is B", "A"),
    ],
)
def test_the_first_literal_label_counts_whatever_it_is_part_of(labels: tuple[str, ...], text: str, found: str) -> None:
    """Not sensible, but the authors': other numbers could not be compared with theirs."""
    match = label_pattern(labels).search(text)
    assert match is not None
    assert match[0] == found


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1 + 2 = 3", 3),
        ("so 1,234.50 dollars", 1234.5),
        ("it is 7.", 7),
        ("5 -3", -3),
        ("from 4-6", -6),
        ("1.2.3", 3),
        ("\nA: 12 and then 0", 0),
        ("none", None),
        ("", None),
        ("x = -0.5 m2", 2),
    ],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5.0, "5"),
        (-72.0, "-72"),
        (0.75, "0.75"),
        (1236666.67, "1236666.67"),
        (2400000.0, "2400000"),
        (-0.0, "0"),
        (0.00001, "0.00001"),
        (1.8333333333333335, "1.833333333"),
        (1e12, "1000000000000"),
        (123456789.125, "123456789.1"),
    ],
)
def test_numbers_are_written_without_exponents_and_zeros(value: float, text: str) -> None:
    assert format_number(value) == text
    assert last_number(text) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    ("equation", "text"),
    [
        ("X=((22.0-14.0)/4.0)", "x = (22 - 14) / 4"),
        ("x=(1+2)*(3-4)", "x = (1 + 2) * (3 - 4)"),
        ("X=-60.0/0.833", "x = -60 / 0.833"),
        ("x=3*(-2.50)", "x = 3 * (-2.5)"),
        ("X = 5256 + 2987", "x = 5256 + 2987"),
        ("miles=4.0/30.0*48.0", "miles = 4 / 30 * 48"),
        ("(200.0/x)-(200.0/(10.0+x))=1.0", "(200 / x) - (200 / (10 + x)) = 1"),
        ("7=3+x", "7 = 3 + x"),
    ],
)
def test_equations_are_written_in_one_way(equation: str, text: str) -> None:
    assert format_equation(equation) == text


def test_what_is_no_equation_is_refused() -> None:
    with pytest.raises(Unparsed, match="'x=2; y=3' cannot be read"):
        format_equation("x=2; y=3")
