"""Measures how close the model is to the truth.

layers.py  compares each layer, from the same input, with transformers and with float64
"""
