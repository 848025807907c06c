"""From text to token ids and back. No module here uses a tensor.

text.py          checks and normalises what users give
layout.py        turns texts into ids, by the model's own chat template
history.py       past turns of a conversation, with the ids that they had
answer_text.py   turns ids into text as they arrive
stop_strings.py  ends an answer before a stop string
lru.py           remembers texts and ids, bounded by bytes
"""
