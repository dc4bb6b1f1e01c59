"""The paper's tables and figures from trained runs.

    registry.py    all of them, by number or name
    exhibit.py     shared: provenance, Markdown, writing
    rows.py        the rows of the tables of cosines, with the paper's numbers
    methods.py     predictions of a row from its runs: ensemble, DAKL, k-NN, captioner;  probe.py  the ceiling
    compute.py     the numbers and the Markdown of these tables
    generation.py  tables 5 and 6, section 4.7: pictures by the trained U-Net;  figures.py  figures 9 and 11
    readouts.py    ridge regression on frozen features
    words.py       which words of a prompt its picture lacks;  confidence.py  the cosine to expect
    runs.py        the runs by name; training of the missing ones
"""
