"""The paper's tables and figures, each by its number, from trained runs.

    runs.py      the runs by name; training those that are missing
    methods.py   what a row makes of its runs: ensemble, DAKL, k-NN, captioner
    rows.py      the tables' rows and the paper's figures
    compute.py   a table's numbers and its Markdown
    figures.py   figures 9 and 11
    merit.py     cosine, intervals, tests, correlation
    pictures.py  sheets of pictures
"""
