"""Values and their buffers: pickled, moved between processes, and what cannot be."""
