"""The operations of the model, one folder each: `reference.py` is the plainest torch that is right, and the CPU's path.

Every operation reads the same packed weights and the same paged KV memory on every device. Accumulation is in float32
(float64 for float64 inputs), rounded once to the input's dtype.
"""
