"""Registering texts in stages. Each stage returns a value that the next one takes.

check.py     finds out which texts can be registered
plan.py      finds out which entries the store lacks, and what computing them takes
register.py  stores the texts and computes the missing entries
"""
