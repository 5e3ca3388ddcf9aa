"""`moa-serve doctor`: whether this installation can be trusted, and what to do where it cannot.

`installation` looks at what is there, `parity` and `golden` let it compute on made-up weights (`made_up`), `speed` times it on a GPU;
`findings` runs the lists of checks, `report` shows what came of them, `plan` says what would fit on a GPU, `command` is the command.
Fetches nothing.
"""
