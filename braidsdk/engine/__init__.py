"""The engine: one thread that owns model, pool and CUDA stream, and serves every request.

engine.py        the handle: how other threads reach the engine's thread
loop.py          the thread, its mailbox and its loop
scheduler.py     decides which request is admitted, and what the next step computes (no torch, no thread)
request.py       one unit of work: its state, and the events that its reader waits for
runner.py        computes a step on any device, as one pass of the model
graphs.py        captures passes as CUDA graphs
graph_runner.py  computes a step with these graphs
batch.py         makes a batch for the model from runs of new tokens
sampling.py      chooses the next token
kernel_choice.py decides which kernels the model runs on
verbose.py       shows what each operation took, at the end of the process
"""
