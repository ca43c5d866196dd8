"""Values and their buffers: pickling, moving between processes, and errors about values that cannot be pickled."""
