"""The commands, one module per noun: a thin layer over the library."""
