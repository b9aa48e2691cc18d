"""The words that options take; apart from the code that they choose, so that --help is quick."""

PRECISIONS = ("fp32", "bf16")
