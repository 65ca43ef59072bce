"""What a peer may do to harm the others, and what comes of it: `make hostile` does all of it to a running server.

`offender` is the client that does it, `pair` the two healthy peers beside it, `scene` both together with the server.
`messages`, `connections` and `memory` are the offences, `offences` the list; `__main__` writes docs/hostile.md.
`tests/e2e/test_offences.py` does the same in short, in every run of the tests.
"""
