"""What `python -m m3oe_fast.report` makes of a run: a file per family of figures, and the text around them.

record.py        what the run folder's files say
sample.py        test rows, their scores and the network's intermediate values
counts.py        labelled rows and positives of every pair
style.py         one look for every figure, and how one becomes a file
curves.py        loss, AUC and logloss by epoch        fusion.py      fusion weights by step
gates.py         use of the shared experts             calibration.py reliability of every pair
embeddings.py    t-SNE of the parts of the fused sum   seesaw.py      gain over models of one pair
markdown.py      report.md
build.py         all of it for one run
"""
