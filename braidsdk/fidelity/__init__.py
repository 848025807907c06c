"""How near the model is to the truth.

layers.py  each layer judged from the same input, against transformers and float64
"""
