"""``histo-infer dsa``: a task of the Digital Slide Archive."""
