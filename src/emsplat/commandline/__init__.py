"""A function as a command: its parameters are the arguments, its docstring is the help."""
