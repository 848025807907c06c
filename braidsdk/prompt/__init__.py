"""Between text and token ids, with no tensor.

text.py          what users give: checked, normalised
layout.py        texts to ids, by the model's own chat template
history.py       past turns of a conversation, with the ids that they had
answer_text.py   ids to text as they arrive
stop_strings.py  where an answer stops
lru.py           texts and ids that are remembered, bounded by bytes
"""
