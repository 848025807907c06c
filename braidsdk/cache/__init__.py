"""KV entries in memory: the pages they lie on, and how they come there.

    pool.py       pages, entries, pins, eviction
    residency.py  what a request needs: found, loaded, to be computed, written

Knows nothing of a request's answer: no sampling, no text.
"""
