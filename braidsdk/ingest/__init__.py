"""Registering texts, in stages; each result is a value that the next stage takes.

check.py     what can be registered, and what can't
plan.py      what the store lacks of it, and what computing that takes
register.py  store the texts, compute what is missing
"""
