"""What a fork costs, next to every other way to get n workers on the same machine: `make bench-fork`.

    __main__    what to measure, in which order; progress; the data file
    parts       the parts of the benchmark: points, and how one sample of each is taken
    session     a job that is told what to do, as the benchmark sees it; `supervisor` and `guest` are its other two sides
    plain       VMs without forks: cold boots, and the classic full save with n restores
    results     the data file
    host        the machine, described without its name
    plots       pictures, drawn from the data file alone
    tables      the tables of docs/performance.md, likewise

Nothing here decides whether a build is good.
"""
