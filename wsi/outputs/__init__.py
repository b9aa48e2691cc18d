"""Label rows in, files out: sinks, the output folder, and the journal of a run."""
