"""Writes the dashboards: JSON that Grafana reads, made from Python.

    python docker/grafana/make.py            write dashboards/*.json
    python docker/grafana/make.py --check    say which are not as this makes them, exit code 1

Needs the package grafana-foundation-sdk, which `pip install -c docker/constraints.txt -e '.[test]'` brings.
"""

import json
import sys
from pathlib import Path

from adapter_board import adapter_board
from expert_board import expert_board
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from panels import Board
from service_board import service_board

FOLDER = Path(__file__).parent / "dashboards"


def text_of(board: Board) -> str:
    """As it lies in a file: panels have ids in their order, so that links to one of them stay."""
    built = board.build()
    for number, panel in enumerate(built.panels or [], start=1):
        panel.id_val = number
    return json.dumps(built, cls=JSONEncoder, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main() -> int:
    stale = []
    for name, board in (("service", service_board()), ("adapters", adapter_board()), ("experts", expert_board())):
        file, text = FOLDER / f"{name}.json", text_of(board)
        if "--check" not in sys.argv[1:]:
            FOLDER.mkdir(exist_ok=True)
            file.write_text(text)
        elif not file.is_file() or file.read_text() != text:
            stale.append(file.name)
    if stale:
        print(f"not as made from the code: {', '.join(stale)}; run python docker/grafana/make.py", file=sys.stderr)  # noqa: T201
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
