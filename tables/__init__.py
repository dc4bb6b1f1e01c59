"""The paper's tables and figures from trained runs, and the project's own questions.

    registry.py    all of them, by number or name
    runs.py        the runs by name; training of the missing ones
    exhibit.py     shared: provenance, Markdown, writing

    rows.py        the rows of the tables of cosines, with the paper's numbers;  compute.py  their numbers
    methods.py     predictions of a row from its runs: ensemble, DAKL, ridge, k-NN
    sweep.py       recipes chosen on validation;  readouts.py  ridge regression on frozen features
    shift.py       DAKL under a shift of domain;  crossed.py  two generators and their pictures (cells.py)
    budget.py      the error by cause;  denoised.py  targets without the wording (wordings.py)
    prompts.py     table 3, figure 4;  redrawn.py  table 4, figure 10
    generation.py  tables 5 and 6, section 4.7;  votes.py  table 5 by people (vote.html);  swap.py  controls
    difficulty.py  difficulty and label noise;  figures.py  figures 9 and 11
    words.py       which words of a prompt the picture lacks;  confidence.py  the expected cosine
    probe.py       references by the probe;  judges.py  how well the probes judge
"""
