"""KV entries in memory: the pages they lie on, and how they get there.

    pool.py          pages, entries, pins, eviction
    residency.py     finds, loads, hands out and writes the entries that requests need
    rates.py         how fast this device computes and loads
    certificates.py  what was measured of modes
    export.py        a context as a cache of transformers

Knows nothing about a request's answer: no sampling, no text.
"""
