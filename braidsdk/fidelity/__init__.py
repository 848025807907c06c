"""Measures how close the model is to the truth, and composed caches to full prefill.

layers.py     compares each layer, from the same input, with transformers and with float64
agreement.py  compares next-token distributions with those of transformers
questions.py  reads questions, their references and what they are asked over
run.py        checks what is asked for, measures, keeps certificates
measure.py    asks them in each mode and in full prefill
calibrate.py  finds the layers by whose attention tokens are repaired
outcomes.py   keeps what was measured, so that an interrupted run goes on
scores.py     judges one answer: SQuAD's exact match and F1, and others
bootstrap.py  intervals
report.py     what came out, as a table, JSON or a plot
"""
