"""What a move of a live connection may be noticed of, and what it costs: `make moves`, the parts in ARGS="load churn".

`load`: thousands that join in-band under load, the time per move, its CPU. `pipeline`: clients that speak right behind
the join, in one segment or byte by byte. `kill`: workers that die in the midst of moves. `churn`: does anything grow,
and what a connection holds after a move. Each is a function that returns a `Report` (`loadtest.faults`), in which
failures are sentences; `peers` are the clients that check what they hear, `counts` is what the server says of itself.
`tests/e2e/test_moves_load.py` does the first two in short.
"""
