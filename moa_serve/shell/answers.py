"""The answers of `moa-serve generate`: run all of them in one batch, then show them side by side, as plain text or as JSON."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moa_serve.engine.activity import Activity
from moa_serve.engine.request import SamplingParams
from moa_serve.errors import InvalidRequest
from moa_serve.llm import LLM, Completion
from moa_serve.shell.activity import activity_table, cost
from moa_serve.shell.heat import show_lines, width_of
from moa_serve.shell.prompts import PromptLine
from moa_serve.shell.selection import Column
from moa_serve.shell.terminal import is_terminal, visible

_MIN_COLUMN = 30  # terminal columns that a text needs to be read beside another
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
_TAB = 4


@dataclass(frozen=True, slots=True)
class Answer:
    """What one adapter, or the base, made of one prompt."""

    line: PromptLine
    column: Column
    completion: Completion


def pair(lines: Iterable[PromptLine], columns: Mapping[str | None, Column], default: Sequence[Column]) -> list[tuple[PromptLine, Column]]:
    """Every prompt with every default column, or with the one that it names itself."""
    pairs = []
    for line in lines:
        own = [columns[line.adapter]] if line.has_adapter else default
        if not own:
            raise InvalidRequest(f"{line.where}: nothing is left to run it; name an adapter, or leave --no-base out", param="no_base")
        pairs += [(line, column) for column in own]
    return pairs


def run(llm: LLM, pairs: Sequence[tuple[PromptLine, Column]], params: SamplingParams, moa: Mapping[str, Any] | None = None) -> list[Answer]:
    """One `generate` call: prompts and adapters mixed in one batch. `moa`: routing options of all adapters; the base has none."""
    options = [None if column.name is None else moa for _, column in pairs]
    completions = llm.generate([line.prompt for line, _ in pairs], params, adapter=[column.name for _, column in pairs], moa=options)
    return [Answer(line, column, completion) for (line, column), completion in zip(pairs, completions, strict=True)]


def activity_of(llm: LLM, answers: Iterable[Answer], moa: Mapping[str, Any] | None = None) -> Activity | None:
    """What the routers of one adapter did in its answers, which were made under `moa`; None where it has no router, or no answer came."""
    activity = Activity()
    for answer in answers:
        completion, column = answer.completion, answer.column
        if column.name is None or not column.is_routed or completion.error is not None:
            continue
        prompt = list(completion.prompt_token_ids)
        computed = prompt + completion.token_ids[:-1]  # the last token was only drawn; no expert has seen it
        seen = prompt if column.is_pooled else computed  # a pooled router weighs once, by the prompt alone
        activity.add(llm.route(seen, adapter=column.name, moa=moa), len(computed))
    return activity if activity.num_tokens else None


def to_json(answer: Answer, activity: Activity | None) -> str:
    """One line. ASCII only, so that what a model wrote cannot reach a terminal as a control character."""
    completion = answer.completion
    item: dict[str, Any] = {
        "prompt": answer.line.prompt,
        "adapter": answer.column.name,
        "revision": answer.column.revision,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
    }
    if completion.error is not None:
        item["error"] = str(completion.error)
    if activity is not None:
        item["routing"] = activity.to_json()
    return json.dumps(item)


def show(console: Console, answers: Sequence[Answer]) -> None:
    """A block for each prompt, with its answers side by side, or one below the other where the terminal is narrow or none."""
    groups = _by_prompt(answers)
    colours = {column: _COLOURS[i % len(_COLOURS)] for i, column in enumerate(dict.fromkeys(a.column for a in answers if a.column.name))}
    for number, group in enumerate(groups):
        if number:
            console.print()
        if not is_terminal():
            console.print(_plain(group), soft_wrap=True)
            continue
        console.print(Text.assemble(("❯ ", "bold green"), (_text_of_prompt(group[0].line), "bold")))
        if len(group) > 1 and console.width // len(group) >= _MIN_COLUMN:
            console.print(_side_by_side(group, colours))
        else:
            console.print(_stacked(group, colours))


def _by_prompt(answers: Sequence[Answer]) -> list[list[Answer]]:
    groups: dict[int, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(id(answer.line), []).append(answer)  # two equal prompts are two
    return list(groups.values())


def _plain(group: Sequence[Answer]) -> Text:
    parts = [f"prompt: {_indented(_text_of_prompt(group[0].line))}"]
    for answer in group:
        parts.append(f"\n[{answer.column.label}] {answer.column.detail}, {_facts(answer.completion)}")
        parts.append(f"    {_indented(_body(answer.completion))}")
    return Text("\n".join(parts))


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")


def _side_by_side(group: Sequence[Answer], colours: Mapping[Column, str]) -> Table:
    table = Table(box=box.ROUNDED, expand=True, show_footer=True, border_style="dim", pad_edge=True)
    for answer in group:
        table.add_column(_header(answer.column, colours), Text(_facts(answer.completion), style="dim"), ratio=1, overflow="fold")
    table.add_row(*(_cell(answer.completion) for answer in group))
    return table


def _stacked(group: Sequence[Answer], colours: Mapping[Column, str]) -> Group:
    return Group(
        *(
            Panel(
                _cell(answer.completion),
                title=Text.assemble((answer.column.label, f"bold {colours.get(answer.column, '')}"), (f" {answer.column.detail}", "dim")),
                title_align="left",
                subtitle=Text(_facts(answer.completion), style="dim"),
                subtitle_align="right",
                border_style="dim",
            )
            for answer in group
        )
    )


def _header(column: Column, colours: Mapping[Column, str]) -> Text:
    return Text.assemble((column.label, f"bold {colours.get(column, '')}"), "\n", (column.detail, "not bold dim"))


def _cell(completion: Completion) -> Text:
    text = Text(_body(completion).expandtabs(_TAB), overflow="fold")
    if completion.error is not None:
        text.stylize("red")
    elif not completion.text.strip():
        text.stylize("dim")
    return text


def _body(completion: Completion) -> str:
    """The text without the white space around it; `--json` has it as it is."""
    if completion.error is not None:
        return f"{visible(completion.text)}\nerror: {visible(str(completion.error))}".strip()
    if text := visible(completion.text).strip():
        return text
    if completion.text:
        return "(only white space)"
    if completion.finish_reason == "stop" and len(completion.token_ids) < 2:
        return "(nothing: it ended at once)"
    return f"(no text: tokens {' '.join(map(str, completion.token_ids))})"


def _facts(completion: Completion) -> str:
    count = len(completion.token_ids)
    return f"{count} token{'' if count == 1 else 's'}, {completion.finish_reason}"


def _text_of_prompt(line: PromptLine) -> str:
    return visible(line.prompt) if isinstance(line.prompt, str) else f"tokens {' '.join(map(str, line.prompt))}"


def show_activity(console: Console, column: Column, activity: Activity | None) -> None:
    """The table of one adapter, and below it what its choice is worth."""
    console.print()
    title = Text.assemble((column.label, "bold"), (f" {column.detail}", "dim"))
    if activity is None:
        reason = "no answer to look at" if column.is_routed else "no router: its experts always count fully"
        console.print(title.append(f", {reason}"), soft_wrap=True)
        return
    console.print(title.append(f", {activity.num_tokens} tokens", style="dim"), soft_wrap=True)
    show_lines(console, activity_table(activity, width_of(console)))
    console.print(Text(cost(activity), style="bold"), soft_wrap=True)
