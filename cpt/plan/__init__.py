"""Types of a run and the pure rules over them. Reads no file, imports no torch."""
