"""Records that are read on request, outside of the stream."""
