"""Seconds of checks on every node before hours are spent.

It runs under the launcher of the training that it precedes, one process a GPU. Each rank looks at its own
machine; rank 0 hears all, decides, and says one line for each node that fails, or one line when all is well.

    board.py      what ranks tell rank 0 and hear from it, through the store where they met
    node.py       versions, GPU, host memory of a machine
    files.py      corpus, first weights, checkpoints, the disk
    network.py    an all-reduce and its bandwidth, slow nodes
    judgement.py  findings of all ranks to lines, by pure functions
    run.py        the order of all this
"""

from pmc_llama.preflight.run import preflight as preflight
