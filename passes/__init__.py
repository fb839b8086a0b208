"""IR to IR: one pass per file, its docstring shows the graph before and after."""
