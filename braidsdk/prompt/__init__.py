"""Between text and token ids, with no tensor: the text of an answer as it arrives, and where it stops."""
