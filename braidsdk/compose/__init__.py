"""The composition rule: chunks and a mode in, segments, positions and keys out. Touches no tensor.

composition.py  segments, their places, and the key of each one's KV entry
modes.py        what a mode means
repairs.py      which tokens a mode has computed again
attribution.py  which documents an answer looked at
"""
