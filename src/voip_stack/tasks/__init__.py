"""The commands, one module per noun, thin over the library."""
