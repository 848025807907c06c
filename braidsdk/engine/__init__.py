"""The engine: one thread that owns model, pool and CUDA stream, and serves every request.

engine.py        the handle: how other threads reach the engine's
loop.py          the thread, its mailbox, its loop
scheduler.py     which request is admitted, and what the next step computes (no torch, no thread)
request.py       one unit of work: its state, and the events that its reader waits for
runner.py        a step on any device, as one pass of the model
graphs.py        passes captured as CUDA graphs
graph_runner.py  a step on them
batch.py         runs of new tokens as a batch for the model
sampling.py      how the next token is chosen
kernel_choice.py which kernels the model runs on
verbose.py       what each operation took, at the end of the process
"""
