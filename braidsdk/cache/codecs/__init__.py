"""How an entry's keys and values are packed in a file: a module each, named in `ModelIdentity.codec`.

A codec names its tensors, their dtypes and shapes, so that the store can refuse a file that has others.
"""
