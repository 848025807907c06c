"""The engine: one thread that owns model, pool and CUDA stream, and serves every request.

engine.py     the thread, its mailbox, its loop
scheduler.py  which request is admitted, and what the next step computes (no torch, no thread)
request.py    one unit of work: its state, and the events that its reader waits for
runner.py     a step on any device, as one pass of the model
graphs.py     a step on CUDA graphs
batch.py      runs of new tokens as a batch for the model
sampling.py   how the next token is chosen
"""
