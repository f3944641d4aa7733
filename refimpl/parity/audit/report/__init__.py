"""The report of an audit, from plain data: what the page and the terminal show is in audit.json.

    data.py                the data: everything that the audit found, as audit.json has it
    operation_table.py     `OperationTable`: the verdicts over all operations, added up per kind of operation as they come
    flags.py               what of PyTorch's settings decides how operations compute, as it is in force
    wording.py             numbers and places as text, the same on page and terminal
    terminal.py            the data as a few lines for the terminal
    page.py                the data as an HTML page; casts_part.py: what conversions did; recipe_part.py: the recipe
    operands.py            `Operands`: arguments and results of a few operations, kept to be judged once more
    catalogue_page.py      the catalogue of rules as a page of docs/
    excerpts.py            a part of an operation that is too large to be kept
    files.py               audit.html, audit.json and audit.safetensors in a folder
    replay.py              judges the operations of such a folder once more
"""
